"""Names of the metrics in PromQL expressions, and of the series that exist."""

import re

from cluster.metrics import table
from cluster.monitoring.foreign import FOREIGN

_NOT_NAMES = {
    *("and", "or", "unless", "by", "without", "on", "ignoring", "offset", "bool", "inf"),
    *("group_left", "group_right"),
}
_REMOVED = (
    r'"[^"]*"',  # strings
    r"\{[^}]*\}",  # matchers
    r"\[[^\]]*\]",  # ranges
    r"\b(by|without|on|ignoring|group_left|group_right)\s*\([^)]*\)",  # labels
    r"\b\d[\w.]*",  # numbers and durations
)


def metric_names(expr: str) -> set[str]:
    """Return the names of the metrics in an expression."""
    for pattern in _REMOVED:
        expr = re.sub(pattern, " ", expr)
    found = re.findall(r"([a-zA-Z_][\w:]*)(\s*\()?", expr)
    return {name for name, is_call in found if not is_call and name not in _NOT_NAMES}


def known_series() -> set[str]:
    """Return the names of all series that Tandem, Ray and vLLM export."""
    series = {*FOREIGN, "ALERTS"}
    for metric in table.all_metrics():
        if metric.kind == "histogram":
            series |= {f"{metric.name}_{part}" for part in ("bucket", "sum", "count")}
        else:
            series.add(metric.name)
    return series
