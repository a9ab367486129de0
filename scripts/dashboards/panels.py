"""Panels, variables and queries that the dashboards are made of."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from grafana_foundation_sdk.builders import heatmap, prometheus, stat, timeseries
from grafana_foundation_sdk.builders.dashboard import Dashboard, QueryVariable, Row
from grafana_foundation_sdk.models.dashboard import DataSourceRef, VariableRefresh
from grafana_foundation_sdk.models.prometheus import PromQueryFormat

P = TypeVar("P", timeseries.Panel, stat.Panel)

DATA_SOURCE = DataSourceRef(type_val="prometheus", uid="prometheus")
REPLICAS_BY_STATE = (
    'max by (model, state) (sum by (model, state, replica) (tandem_replicas{model=~"$model"}))'
)
"""PromQL for the replicas by state. Routers may know different numbers; the highest counts."""
PANEL_HEIGHT = 8
"""Height in units of Grafana's grid, which is 24 units wide."""


@dataclass(frozen=True, slots=True)
class Query:
    """PromQL expression and the legend of its series."""

    expr: str
    legend: str = "{{model}}"


def make_dashboard(
    uid: str, title: str, description: str, variables: Sequence[QueryVariable]
) -> Dashboard:
    """Return an empty dashboard that shows the last hour."""
    board = (
        Dashboard(title)
        .uid(f"tandem-{uid}")
        .description(description)
        .tags(["tandem"])
        .refresh("10s")
        .time("now-1h", "now")
        .timezone("browser")
    )
    for variable in variables:
        board = board.with_variable(variable)
    return board


def make_variable(label: str, metric: str) -> QueryVariable:
    """Return a drop-down with the values of ``label`` in ``metric``; all are selected at first."""
    return (
        QueryVariable(label)
        .label(label)
        .query(f"label_values({metric}, {label})")
        .datasource(DATA_SOURCE)
        .refresh(VariableRefresh.ON_TIME_RANGE_CHANGED)
        .multi(True)
        .include_all(True)
        .all_value(".*")
    )


def graph(title: str, unit: str, *queries: Query, width: int = 8) -> timeseries.Panel:
    return _queried(timeseries.Panel().fill_opacity(8).min(0), title, unit, queries, width)


def stat_panel(title: str, unit: str, query: Query, width: int = 4) -> stat.Panel:
    """Return a panel that shows the current value."""
    return _queried(stat.Panel(), title, unit, [query], width).height(5)


def heatmap_panel(title: str, histogram: str, width: int = 12) -> heatmap.Panel:
    """Return a heat map of a histogram's buckets over time."""
    expr = f'sum by (le) (increase({histogram}_bucket{{model=~"$model"}}[$__rate_interval]))'
    target = _target(Query(expr, "{{le}}"), "A").format(PromQueryFormat.HEATMAP)
    panel = heatmap.Panel().title(title).datasource(DATA_SOURCE).calculate(False)
    return panel.unit("s").span(width).height(PANEL_HEIGHT).with_target(target)


def section(title: str) -> Row:
    """Return a heading above a group of panels."""
    return Row(title)


def quantiles(metric: str, *levels: float) -> list[Query]:
    """Return queries for quantiles of a histogram, per selected model."""
    rate = f'sum by (model, le) (rate({metric}_bucket{{model=~"$model"}}[$__rate_interval]))'
    return [
        Query(f"histogram_quantile({q:g}, {rate})", f"{{{{model}}}} p{q * 100:g}") for q in levels
    ]


def rate_of(metric: str, by: str = "model", where: str = 'model=~"$model"') -> str:
    """Return the rate per second of a counter, summed over all processes."""
    return f"sum by ({by}) (rate({metric}{{{where}}}[$__rate_interval]))"


def sum_of(metric: str, by: str = "model", where: str = 'model=~"$model"') -> str:
    """Return a gauge, summed over all processes."""
    return f"sum by ({by}) ({metric}{{{where}}})"


def selected(metric: str) -> str:
    """Return a metric of every process, restricted to the selected models."""
    return f'{metric}{{model=~"$model"}}'


def add_panels(board: Dashboard, panels: Sequence[Any]) -> Dashboard:
    """Return the dashboard with these panels and headings, from left to right."""
    for panel in panels:
        board = board.with_row(panel) if isinstance(panel, Row) else board.with_panel(panel)
    return board


def _queried(panel: P, title: str, unit: str, queries: Sequence[Query], width: int) -> P:
    panel = panel.title(title).unit(unit).datasource(DATA_SOURCE).span(width).height(PANEL_HEIGHT)
    for name, query in zip("ABCDEFGH", queries, strict=False):
        panel = panel.with_target(_target(query, name))
    return panel


def _target(query: Query, name: str) -> prometheus.Dataquery:
    return prometheus.Dataquery().expr(query.expr).legend_format(query.legend).ref_id(name)
