"""Prometheus' configuration: scrape targets, intervals and rule files. Pure."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

RULES = Path(__file__).parent / "rules"
"""Directory of the recording and alert rules."""
SCRAPE_INTERVAL_S = 10
"""Export interval of Ray's agents, which drop a value after twice this time."""
SERVICE_DISCOVERY = "/api/prometheus/sd"
"""Path on Ray's dashboard that lists the agents of all nodes."""
# Remove the prefix that Ray's agents add, so that Tandem's metrics have their documented names.
RENAME = {"source_labels": ["__name__"], "regex": "ray_(tandem_.+)", "target_label": "__name__"}
"""Relabelling of the metrics of Ray's agents."""


@dataclass(frozen=True, slots=True)
class Targets:
    """Scrape targets of Prometheus."""

    dashboard: str
    """URL of Ray's dashboard."""
    ingress: str | None
    """Address of the routers as ``host:port``; None if ``/metrics`` requires an unknown key."""
    token_file: str | None = None
    """File with Ray's token; None if the dashboard requires none."""
    key_file: str | None = None
    """File with an API key of the routers, an operator's if their values are to be read; None if
    they require none."""
    uses_tls: bool = False
    """True if the routers' HTTP is HTTPS."""


def configuration(targets: Targets, rules: Sequence[str]) -> str:
    """Return Prometheus' configuration as YAML; ``rules`` are paths or globs of rule files."""
    jobs = [_ray(targets)]
    if targets.ingress is not None:
        jobs.append(_ingress(targets))
    document = {
        "global": {
            "scrape_interval": f"{SCRAPE_INTERVAL_S}s",
            "evaluation_interval": f"{SCRAPE_INTERVAL_S}s",
        },
        "rule_files": list(rules),
        "scrape_configs": jobs,
    }
    return yaml.safe_dump(document, sort_keys=False)


def _ray(targets: Targets) -> dict[str, Any]:
    """Return the job that scrapes all metrics: Ray's agents export those of all processes."""
    discovery: dict[str, Any] = {
        "url": f"{targets.dashboard}{SERVICE_DISCOVERY}",
        "refresh_interval": f"{SCRAPE_INTERVAL_S}s",
    }
    if targets.token_file is not None:
        discovery["authorization"] = {"credentials_file": targets.token_file}
    return {
        "job_name": "ray",
        "http_sd_configs": [discovery],
        # Each series has the node's address as a label.
        "metric_relabel_configs": [RENAME],
    }


def _ingress(targets: Targets) -> dict[str, Any]:
    """Return the job that checks whether a router responds over HTTP."""
    # Drop all values: several routers share the address, so their counters would appear to jump.
    drop = {"source_labels": ["__name__"], "regex": ".+", "action": "drop"}
    file = targets.key_file
    authorization = {"authorization": {"credentials_file": file}} if file else {}
    # The certificate may be for another name than this node's address.
    tls = {"scheme": "https", "tls_config": {"insecure_skip_verify": True}}
    return {
        "job_name": "ingress",
        **authorization,
        **(tls if targets.uses_tls else {}),
        "static_configs": [{"targets": [targets.ingress]}],
        "metric_relabel_configs": [drop],
    }
