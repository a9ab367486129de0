"""Every file that Grafana and the compose file's Prometheus read, by its path."""

import yaml
from grafana_foundation_sdk.cog.encoder import JSONEncoder

from cluster.monitoring.prometheus import Targets, configuration
from dashboards import classifier, cost, generator, overview, router, tenant
from dashboards.alerting import FOLDER, alerting
from dashboards.panels import SOURCE

PAGES = {
    "overview": overview.overview,
    "generator": generator.generator,
    "classifier": classifier.classifier,
    "router": router.router,
    "cost": cost.cost,
    "tenant": tenant.tenant,
}
DASHBOARDS = "/var/lib/grafana/dashboards"
"""Where the compose file mounts the pages."""


def files() -> dict[str, str]:
    """Contents by path below ``cluster/monitoring/grafana``."""
    pages = {
        f"dashboards/{name}.json": JSONEncoder(sort_keys=True, indent=2).encode(make().build())
        for name, make in PAGES.items()
    }
    return {
        **{path: f"{text}\n" for path, text in pages.items()},
        "provisioning/datasources/prometheus.yml": _yaml(_data_source()),
        "provisioning/dashboards/tandem.yml": _yaml(_provider()),
        "provisioning/alerting/tandem.yml": alerting(),
        "prometheus.yml": configuration(
            Targets(dashboard="http://127.0.0.1:8265", ingress="127.0.0.1:8000"),
            ["/etc/prometheus/rules/*.yml"],
        ),
    }


def _data_source() -> dict[str, object]:
    # Ray's own dashboards ask for a source of this name.
    source = {
        "name": "Prometheus",
        "uid": SOURCE.uid,
        "type": SOURCE.type_val,
        "url": "http://127.0.0.1:9090",
        "access": "proxy",
        "isDefault": True,
        "jsonData": {"timeInterval": "10s"},
    }
    return {"apiVersion": 1, "datasources": [source]}


def _provider() -> dict[str, object]:
    def provider(folder: str, path: str) -> dict[str, object]:
        return {"name": folder, "folder": folder, "type": "file", "options": {"path": path}}

    return {
        "apiVersion": 1,
        "providers": [
            provider(FOLDER, f"{DASHBOARDS}/tandem"),
            provider("Ray", f"{DASHBOARDS}/ray"),
        ],
    }


def _yaml(document: dict[str, object]) -> str:
    text: str = yaml.safe_dump(document, sort_keys=False)
    return text
