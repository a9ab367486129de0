"""What a PromQL expression asks for, as far as the tests want to know."""

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


def names(expr: str) -> set[str]:
    """The metrics in an expression."""
    for pattern in _REMOVED:
        expr = re.sub(pattern, " ", expr)
    found = re.findall(r"([a-zA-Z_][\w:]*)(\s*\()?", expr)
    return {name for name, is_call in found if not is_call and name not in _NOT_NAMES}


def known() -> set[str]:
    """Every series that there can be, but for recorded ones."""
    series = {*FOREIGN, "ALERTS"}
    for metric in table.all_metrics():
        if metric.kind == "histogram":
            series |= {f"{metric.name}_{part}" for part in ("bucket", "sum", "count")}
        else:
            series.add(metric.name)
    return series
