"""Time ranges and queries of panels: what a request may ask, and PromQL with variables replaced."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from cluster.monitoring.panels.dashboards import ALL, Dashboard, Variable
from cluster.monitoring.prometheus import SCRAPE_INTERVAL_S

MAX_RANGE_S = 31 * 86400.0
"""Longest time range, twice what Prometheus keeps."""
MAX_POINTS = 500
"""Most points of a series; a panel is rarely wider than 1000 pixels."""
MIN_POINTS = 20
MAX_VALUES = 50
"""Most values of one variable in a request."""
MAX_VALUE_LENGTH = 300
_UNITS_S = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 7 * 86400}
_TIME = re.compile(r"now(?:-(\d{1,6})([smhdw]))?")
_QUOTED = re.compile(r'("(?:\\.|[^"\\])*"|\'(?:\\.|[^\'\\])*\')')
_NAME = re.compile(r"\$(\w+)|\$\{(\w+)(?::\w+)?\}|\[\[(\w+)\]\]")
_REGEX_SPECIAL = re.compile(r"[\\^$.|?*+()\[\]{}]")


class BadRequestError(Exception):
    """Request that the panel server does not answer, with the reason for the user."""


@dataclass(frozen=True, slots=True)
class TimeRange:
    """Times of a query, in Unix seconds; start and end are multiples of the step."""

    start: float
    end: float
    step: float

    @property
    def points(self) -> int:
        return round((self.end - self.start) / self.step) + 1


def parse_range(start: str, end: str, points: int, now: float) -> TimeRange:
    """Return the range between two of Grafana's times, ``now``, ``now-5m`` or Unix milliseconds.

    Raises:
        BadRequestError: a time is invalid, or the range is empty or too long.
    """
    first, last = _parse_time(start, now), _parse_time(end, now)
    if not 0 < last - first <= MAX_RANGE_S:
        limit = f"{MAX_RANGE_S / 86400:.0f} days"
        raise BadRequestError(f"the range from {start} to {end} must be positive, at most {limit}")
    wanted = (last - first) / min(max(points, MIN_POINTS), MAX_POINTS - 1)
    # Multiples of the scrape interval make the same points in each refresh.
    step = max(1, math.ceil(wanted / SCRAPE_INTERVAL_S)) * float(SCRAPE_INTERVAL_S)
    return TimeRange(math.floor(first / step) * step, math.floor(last / step) * step, step)


def _parse_time(text: str, now: float) -> float:
    if match := _TIME.fullmatch(text):
        return now - (int(match[1]) * _UNITS_S[match[2]] if match[1] else 0)
    if re.fullmatch(r"\d{1,14}", text):
        return int(text) / 1000
    raise BadRequestError(f"time {text[:40]!r} is invalid; use now, now-5m or Unix milliseconds")


Selection = Mapping[str, tuple[str, ...]]
"""Chosen values of each variable."""


def select(dashboard: Dashboard, requested: Mapping[str, Sequence[str]]) -> Selection:
    """Return the values of a dashboard's variables; ``requested`` may lack some or have others.

    Raises:
        BadRequestError: a value is not allowed.
    """
    return {
        variable.name: _values(variable, requested.get(variable.name) or ())
        for variable in dashboard.variables
    }


def _values(variable: Variable, requested: Sequence[str]) -> tuple[str, ...]:
    # Ray's dashboard sends "undefined" for what it does not know.
    values = tuple(value for value in requested if value not in ("", "undefined"))
    if not values:
        return variable.default
    if variable.include_all and set(values) & {ALL, "All"}:
        return (ALL,)
    if len(values) > MAX_VALUES or max(map(len, values)) > MAX_VALUE_LENGTH:
        raise BadRequestError(
            f"variable {variable.name} has more than {MAX_VALUES} values, or one with more than "
            f"{MAX_VALUE_LENGTH} characters"
        )
    if any(not value.isprintable() for value in values):
        raise BadRequestError(f"variable {variable.name} has a control character")
    if variable.is_fixed and not set(values) <= set(variable.options):
        allowed = ", ".join(variable.options)
        raise BadRequestError(f"variable {variable.name} must be one of {allowed}")
    return values


def substitute(expr: str, dashboard: Dashboard, selection: Selection, times: TimeRange) -> str:
    """Return ``expr`` with its variables replaced.

    A value from a request is only put into a quoted string, as an escaped regular expression, so it
    cannot change the query's structure.

    Raises:
        BadRequestError: the query uses an unknown variable, or has one where it is not allowed.
    """
    if "`" in expr:  # strings without escapes
        raise BadRequestError("the query has a raw string, which is not supported")
    variables = {variable.name: variable for variable in dashboard.variables}
    macros = _macros(times)

    def replace(part: str, is_quoted: bool) -> str:
        def value(match: re.Match[str]) -> str:
            name = match[1] or match[2] or match[3]
            if name in macros:
                return macros[name]
            if (variable := variables.get(name)) is None:
                raise BadRequestError(f"the query uses the unknown variable {name}")
            if is_quoted:
                return _pattern(variable, selection[name])
            if not variable.is_fixed or len(selection[name]) != 1 or ALL in selection[name]:
                raise BadRequestError(f"the query has variable {name} outside of quotes")
            return selection[name][0]

        return _NAME.sub(value, part)

    parts = _QUOTED.split(expr)  # each second one is quoted
    return "".join(replace(part, index % 2 == 1) for index, part in enumerate(parts))


def _macros(times: TimeRange) -> dict[str, str]:
    length = round(times.end - times.start)
    rate_s = max(times.step + SCRAPE_INTERVAL_S, 4 * SCRAPE_INTERVAL_S)  # as Grafana does
    return {
        "__interval": f"{times.step:.0f}s",
        "__interval_ms": f"{times.step * 1000:.0f}",
        "__rate_interval": f"{rate_s:.0f}s",
        "__range": f"{length}s",
        "__range_s": f"{length}",
        "__range_ms": f"{length * 1000}",
    }


def _pattern(variable: Variable, values: tuple[str, ...]) -> str:
    """Return the values as a regular expression inside of a PromQL string."""
    if ALL in values:
        if variable.all_value is not None:
            return variable.all_value
        values = variable.options
        if not values:
            return ".*"
    escaped = [_quote(_REGEX_SPECIAL.sub(r"\\\g<0>", value)) for value in values]
    return escaped[0] if len(escaped) == 1 else f"({'|'.join(escaped)})"


def _quote(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("'", "\\'")
