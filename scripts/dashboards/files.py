"""All generated files: for Grafana, the Prometheus of ``compose.yml``, and Kubernetes."""

from pathlib import Path

import yaml
from grafana_foundation_sdk.cog.encoder import JSONEncoder

import cluster.monitoring
from cluster.monitoring.prometheus import Targets, configuration
from dashboards import classifier, cost, generator, kubernetes, overview, router, tenant
from dashboards.alerting import FOLDER, make_alert_rules
from dashboards.panels import DATA_SOURCE

ROOT = Path(cluster.monitoring.__file__).parent / "grafana"
KUBERNETES = Path(__file__).parents[2] / "deployments" / "kubernetes" / "components" / "monitoring"
DASHBOARDS = {
    "overview": overview.overview,
    "generator": generator.generator,
    "classifier": classifier.classifier,
    "router": router.router,
    "cost": cost.cost,
    "tenant": tenant.tenant,
}
MOUNT_POINT = "/var/lib/grafana/dashboards"
"""Directory in the container where ``compose.yml`` mounts the dashboards."""


def make_files() -> dict[Path, str]:
    """Return the content of each generated file by its path."""
    objects = {KUBERNETES / name: text for name, text in kubernetes.make_objects().items()}
    return {**{ROOT / path: text for path, text in _grafana().items()}, **objects}


def _grafana() -> dict[str, str]:
    dashboards = {
        f"dashboards/{name}.json": JSONEncoder(sort_keys=True, indent=2).encode(make().build())
        for name, make in DASHBOARDS.items()
    }
    return {
        **{path: f"{text}\n" for path, text in dashboards.items()},
        "provisioning/datasources/prometheus.yml": _yaml(_data_source()),
        "provisioning/dashboards/tandem.yml": _yaml(_provider()),
        "provisioning/alerting/tandem.yml": make_alert_rules(),
        "prometheus.yml": configuration(
            Targets(dashboard="http://127.0.0.1:8265", ingress="127.0.0.1:8000"),
            ["/etc/prometheus/rules/*.yml"],
        ),
    }


def _data_source() -> dict[str, object]:
    # Ray's own dashboards expect a data source of this name.
    source = {
        "name": "Prometheus",
        "uid": DATA_SOURCE.uid,
        "type": DATA_SOURCE.type_val,
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
            provider(FOLDER, f"{MOUNT_POINT}/tandem"),
            provider("Ray", f"{MOUNT_POINT}/ray"),
        ],
    }


def _yaml(document: dict[str, object]) -> str:
    text: str = yaml.safe_dump(document, sort_keys=False)
    return text
