"""Writes ``docs/metrics.md``: ``python -m cluster.monitoring.docs > docs/metrics.md``."""

import sys
from collections.abc import Mapping

from cluster.metrics import Metric, table
from cluster.monitoring.foreign import RAY, VLLM

_HEAD = """\
# Metrics

Written by `python -m cluster.monitoring.docs`; the source is `cluster/metrics/table.py`.

Every figure is in base units. A router gives its own at `GET /metrics`; all processes give theirs
to Ray's agents, which put `ray_` before the name and the labels `deployment` and `replica` beside
its own. The Prometheus of `tandem up --monitoring` asks the agents and takes the `ray_` of Tandem's
metrics away again, so that names are everywhere as they stand here. `model` is a pool's name,
`route` a path of its engine, `tenant` one that the configuration knows: no request can make a new
series. Through Ray's agents counters and histograms have the type gauge; their values are the same.
A metric that has nothing to say (no GPU, no TLS, no tenant) is absent, not zero.

"""
_RAY = """
## Ray's own

Those that the alerts and dashboards use; Ray's documentation (System Metrics, Monitor Your
Application) has them all.

"""
_VLLM = """
## vLLM's own

Generators with `engine: vllm` give all of vLLM's metrics to Ray, `vllm:` written as `ray_vllm_`.
Those that the dashboards use:

"""


def markdown() -> str:
    """The whole page."""
    return "".join([_HEAD, _own(table.all_metrics()), _RAY, _names(RAY), _VLLM, _names(VLLM)])


def _own(metrics: list[Metric]) -> str:
    rows = ["| metric | kind | labels | meaning |", "|---|---|---|---|"]
    for metric in metrics:
        labels = ", ".join(f"`{label}`" for label in metric.labels)
        rows.append(
            f"| `{metric.name}` | {metric.kind} | {labels} | {metric.help}{_bounds(metric)} |"
        )
    return "\n".join(rows) + "\n"


def _bounds(metric: Metric) -> str:
    if not metric.buckets:
        return ""
    return f" {len(metric.buckets)} buckets, {metric.buckets[0]:g} to {metric.buckets[-1]:g}."


def _names(metrics: Mapping[str, str]) -> str:
    rows = ["| metric | meaning |", "|---|---|"]
    rows += [f"| `{name}` | {text} |" for name, text in metrics.items()]
    return "\n".join(rows) + "\n"


if __name__ == "__main__":
    sys.stdout.write(markdown())
