"""Start of Grafana, or of its stand-in, whose panels Ray's dashboard embeds.

Grafana is used if ``grafana-server`` is installed. Like Prometheus, the process has the cluster's
id in its environment, so ``stop`` ends it; its files are in ``<home>/monitoring``.
"""

import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import urlsplit

import yaml

from cluster import monitoring
from cluster.launch.ports import LOOPBACK
from cluster.launch.prometheus import MonitoringProcess, monitoring_dir, ray_dashboards_dir, spawn
from cluster.launch.state import ClusterState

GRAFANA = Path(monitoring.__file__).parent / "grafana"
"""Dashboards, and provisioning files for the container of ``compose.yml``."""
PACKAGED_HOME = Path("/usr/share/grafana")
"""Grafana's ``homepath`` in the packages for Debian and Red Hat."""


def grafana_executable() -> str | None:
    """Return the path of Grafana; None if the stand-in is to be used."""
    return shutil.which("grafana-server")


def ray_variables(url: str) -> dict[str, str]:
    """Return the variables with which Ray's dashboard embeds the panels at ``url``."""
    return {"RAY_GRAFANA_HOST": url, "RAY_GRAFANA_IFRAME_HOST": url, "RAY_GRAFANA_ORG_ID": "1"}


def start(home: Path, cluster: ClusterState, variables: Mapping[str, str]) -> MonitoringProcess:
    """Start Grafana or its stand-in on loopback, with ``variables`` as its environment."""
    executable = grafana_executable()
    if executable is None:
        log = monitoring_dir(home) / "charts.log"
        return spawn("the server of charts", _stand_in(home, cluster), log, variables)
    settings = _grafana_settings(home)
    directory = Path(settings["GF_PATHS_PROVISIONING"])
    shutil.rmtree(directory, ignore_errors=True)
    write_provisioning(directory, home, str(cluster.prometheus_url))
    command = [executable, "--homepath", str(grafana_home(executable))]
    log = monitoring_dir(home) / "grafana.log"
    return spawn("Grafana", command, log, {**settings, **variables, **_address(cluster)})


def _stand_in(home: Path, cluster: ClusterState) -> list[str]:
    folders = {"Tandem": GRAFANA / "dashboards", "Ray": ray_dashboards_dir(home)}
    origins = frame_ancestors(cluster.dashboard_url)
    return [
        *(sys.executable, "-m", "cluster.monitoring.panels"),
        *("--port", str(urlsplit(str(cluster.grafana_url)).port)),
        *("--prometheus", str(cluster.prometheus_url)),
        *(word for name, path in folders.items() for word in ("--folder", f"{name}={path}")),
        *(word for origin in origins for word in ("--frame-ancestor", origin)),
    ]


def frame_ancestors(dashboard_url: str) -> list[str]:
    """Return the origins under which a browser on this machine shows Ray's dashboard."""
    port = urlsplit(dashboard_url).port
    names = (f"http://{LOOPBACK}:{port}", f"http://localhost:{port}")
    return list(dict.fromkeys((dashboard_url, *names)))


def grafana_home(executable: str) -> Path:
    """Return Grafana's ``homepath``: of an unpacked archive, or that of the packages."""
    archive = Path(executable).resolve().parents[1]
    return archive if (archive / "conf" / "defaults.ini").exists() else PACKAGED_HOME


def _address(cluster: ClusterState) -> dict[str, str]:
    address = urlsplit(str(cluster.grafana_url))
    return {
        "GF_SERVER_HTTP_ADDR": str(address.hostname),
        "GF_SERVER_HTTP_PORT": str(address.port),
        "GF_SERVER_PROTOCOL": "http",
    }


def _grafana_settings(home: Path) -> dict[str, str]:
    """Return Grafana's settings: read-only, without sign-in. Those of the user's shell win."""
    directory = monitoring_dir(home) / "grafana"
    return {
        "GF_LOG_MODE": "console",
        "GF_PATHS_DATA": str(directory),
        "GF_PATHS_LOGS": str(directory / "logs"),
        "GF_PATHS_PLUGINS": str(directory / "plugins"),
        "GF_PATHS_PROVISIONING": str(directory / "provisioning"),
        "GF_AUTH_ANONYMOUS_ENABLED": "true",
        "GF_AUTH_ANONYMOUS_ORG_ROLE": "Viewer",
        "GF_AUTH_BASIC_ENABLED": "false",
        "GF_AUTH_DISABLE_LOGIN_FORM": "true",
        # Otherwise there is an administrator with a known password.
        "GF_SECURITY_DISABLE_INITIAL_ADMIN_CREATION": "true",
        "GF_SECURITY_ALLOW_EMBEDDING": "true",
        "GF_ANALYTICS_REPORTING_ENABLED": "false",
        "GF_ANALYTICS_CHECK_FOR_UPDATES": "false",
        "GF_ANALYTICS_CHECK_FOR_PLUGIN_UPDATES": "false",
    }


def write_provisioning(directory: Path, home: Path, prometheus_url: str) -> None:
    """Write the provisioning files of ``cluster/monitoring`` with the addresses of this cluster."""
    source = GRAFANA / "provisioning"
    shutil.copytree(source, directory)
    data_source = directory / "datasources" / "prometheus.yml"
    document = yaml.safe_load(data_source.read_text(encoding="utf-8"))
    document["datasources"][0]["url"] = prometheus_url
    data_source.write_text(yaml.safe_dump(document), encoding="utf-8")
    paths = {"Tandem": GRAFANA / "dashboards", "Ray": ray_dashboards_dir(home)}
    providers = directory / "dashboards" / "tandem.yml"
    document = yaml.safe_load(providers.read_text(encoding="utf-8"))
    for provider in document["providers"]:
        provider["options"]["path"] = str(paths[provider["folder"]])
    providers.write_text(yaml.safe_dump(document), encoding="utf-8")
