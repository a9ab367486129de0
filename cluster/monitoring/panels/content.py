"""Contents of panels and dashboards for the page: names and numbers, no queries."""

import asyncio
import re
from collections.abc import Mapping, Sequence
from typing import Any

from cluster.monitoring.panels.dashboards import ALL, Dashboard, Panel, Target, Variable
from cluster.monitoring.panels.prometheus import Prometheus, QueryError, Result
from cluster.monitoring.panels.queries import (
    BadRequestError,
    Selection,
    TimeRange,
    substitute,
)

MAX_TARGETS = 12
_LABEL_VALUES = re.compile(r"label_values\(\s*(?:(.+),)?\s*(\w+)\s*\)", re.DOTALL)


async def panel_content(
    prometheus: Prometheus,
    dashboard: Dashboard,
    panel: Panel,
    selection: Selection,
    times: TimeRange,
) -> dict[str, Any]:
    """Return the panel's description and its series.

    Raises:
        BadRequestError: a query cannot be run with these variables.
        QueryError: Prometheus gave no result.
    """

    async def run(target: Target) -> Result:
        expr = substitute(target.expr, dashboard, selection, times)
        if panel.kind in ("values", "table"):
            return await prometheus.query(expr, times.end)
        return await prometheus.query_range(expr, times)

    targets = panel.targets[:MAX_TARGETS]
    results = await asyncio.gather(*(run(target) for target in targets))
    series = [
        _series(panel, target.name_series(each.labels), each.values)
        for target, result in zip(targets, results, strict=True)
        for each in result.series
    ]
    if panel.kind == "heatmap":
        series = _buckets(series)
    return {
        **describe_panel(panel),
        "start": times.start,
        "step": times.step,
        "points": times.points,
        "series": series,
        "omitted": sum(result.num_omitted for result in results),
    }


def _series(panel: Panel, name: str, values: Sequence[float | None]) -> dict[str, Any]:
    factor = panel.unit.factor
    scaled = [None if value is None else value * factor for value in values]
    return {"name": name, "values": scaled, **panel.appearance(name)}


def _buckets(series: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Convert cumulative counts, whose names are the upper bounds, to counts of each bucket."""
    try:
        ordered = sorted(series, key=lambda each: float(each["name"]))
    except ValueError:
        raise QueryError("the heatmap's series are not named by upper bounds") from None
    below: Sequence[float | None] = [0.0] * len(ordered[0]["values"]) if ordered else ()
    buckets = []
    for each in ordered:
        pairs = zip(each["values"], below, strict=True)
        counts = [None if a is None else max(0.0, a - (b or 0.0)) for a, b in pairs]
        buckets.append({**each, "values": counts})
        below = each["values"]
    return buckets


def describe_panel(panel: Panel) -> dict[str, Any]:
    return {
        "id": panel.id,
        "kind": panel.kind,
        "title": panel.title,
        "description": panel.description,
        "scale": panel.unit.scale,
        "suffix": panel.unit.suffix,
        "minimum": panel.minimum,
        "position": panel.position,
        "collapsed": panel.collapsed,
        "row": panel.row,
    }


async def dashboard_content(
    prometheus: Prometheus, dashboard: Dashboard, selection: Selection, times: TimeRange
) -> dict[str, Any]:
    """Return the dashboard's layout, and its variables with their values to choose from."""
    lists = (
        _options(prometheus, dashboard, each, selection, times) for each in dashboard.variables
    )
    options = await asyncio.gather(*lists)
    return {
        "uid": dashboard.uid,
        "title": dashboard.title,
        "variables": [
            {
                "name": variable.name,
                "value": list(selection[variable.name]),
                "options": [*([ALL] if variable.include_all else ()), *values],
            }
            for variable, values in zip(dashboard.variables, options, strict=True)
        ],
        "panels": [describe_panel(panel) for panel in dashboard.panels],
    }


async def _options(
    prometheus: Prometheus,
    dashboard: Dashboard,
    variable: Variable,
    selection: Selection,
    times: TimeRange,
) -> Sequence[str]:
    if variable.is_fixed:
        return variable.options
    match = _LABEL_VALUES.fullmatch(variable.definition.strip())
    if match is None:  # another kind of query; "All" and values in the address still work
        return ()
    selector = match[1]
    try:
        if selector is not None:
            selector = substitute(selector.strip(), dashboard, selection, times)
        return await prometheus.label_values(match[2], selector, times)
    except (BadRequestError, QueryError):
        return ()


def list_dashboards(dashboards: Mapping[str, Dashboard]) -> list[dict[str, str]]:
    found = sorted(dashboards.values(), key=lambda each: (each.folder != "Tandem", each.title))
    return [{"uid": each.uid, "title": each.title, "folder": each.folder} for each in found]
