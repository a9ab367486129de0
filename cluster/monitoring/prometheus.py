"""Prometheus' configuration: whom it asks, how often, and which rules it evaluates. Pure."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

RULES = Path(__file__).parent / "rules"
"""The recording and alert rules."""
SCRAPE_INTERVAL_S = 10
"""Ray's agents have new values this often, and forget a value after twice this time."""
SERVICE_DISCOVERY = "/api/prometheus/sd"
"""Of Ray's dashboard: every node's agent."""


@dataclass(frozen=True, slots=True)
class Targets:
    """Whom Prometheus asks."""

    dashboard: str
    """Ray's, as a URL."""
    ingress: str | None
    """The routers' common address as ``host:port``; None where ``/metrics`` asks for a key."""
    token_file: str | None = None
    """Holds Ray's token, where its dashboard asks for one."""


def configuration(targets: Targets, rules: Sequence[str]) -> str:
    """Prometheus' configuration file, with the rules in the files ``rules``."""
    jobs = [_ray(targets)]
    if targets.ingress is not None:
        jobs.append(_ingress(targets.ingress))
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
    """Everything: Ray's agents have the figures of all processes, each with its labels."""
    discovery: dict[str, Any] = {
        "url": f"{targets.dashboard}{SERVICE_DISCOVERY}",
        "refresh_interval": f"{SCRAPE_INTERVAL_S}s",
    }
    if targets.token_file is not None:
        discovery["authorization"] = {"credentials_file": targets.token_file}
    # Tandem's metrics get back the names of the table, which Ray's agents put `ray_` before.
    rename = {
        "source_labels": ["__name__"],
        "regex": "ray_(tandem_.+)",
        "target_label": "__name__",
    }
    return {
        "job_name": "ray",
        "http_sd_configs": [discovery],
        # The discovery names the job "ray" too; the node's address is a label of each series.
        "metric_relabel_configs": [rename],
    }


def _ingress(address: str) -> dict[str, Any]:
    """Whether a router answers over HTTP.

    Behind one address answers now one router, now another, so their counters would jump; the
    figures come from the agents, and here from no router twice.
    """
    drop = {"source_labels": ["__name__"], "regex": ".+", "action": "drop"}
    return {
        "job_name": "ingress",
        "static_configs": [{"targets": [address]}],
        "metric_relabel_configs": [drop],
    }
