"""The kinds of panels and variables that the dashboards are made of."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from grafana_foundation_sdk.builders import heatmap, prometheus, stat, timeseries
from grafana_foundation_sdk.builders.dashboard import Dashboard, QueryVariable, Row
from grafana_foundation_sdk.models.dashboard import DataSourceRef, VariableRefresh
from grafana_foundation_sdk.models.prometheus import PromQueryFormat

P = TypeVar("P", timeseries.Panel, stat.Panel)

SOURCE = DataSourceRef(type_val="prometheus", uid="prometheus")
REPLICAS = (
    'max by (model, state) (sum by (model, state, replica) (tandem_replicas{model=~"$model"}))'
)
"""Replicas by state, as the router that sees most of them sees them."""
HEIGHT = 8
"""In Grafana's grid, whose width is 24."""


@dataclass(frozen=True, slots=True)
class Query:
    """One PromQL expression, and how its series are called."""

    expr: str
    legend: str = "{{model}}"


def page(uid: str, title: str, description: str, variables: Sequence[QueryVariable]) -> Dashboard:
    """An empty dashboard of the last hour."""
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


def variable(label: str, metric: str) -> QueryVariable:
    """A choice among the values that ``label`` has in ``metric``; all of them at first."""
    return (
        QueryVariable(label)
        .label(label)
        .query(f"label_values({metric}, {label})")
        .datasource(SOURCE)
        .refresh(VariableRefresh.ON_TIME_RANGE_CHANGED)
        .multi(True)
        .include_all(True)
        .all_value(".*")
    )


def lines(title: str, unit: str, *queries: Query, width: int = 8) -> timeseries.Panel:
    """Lines over time."""
    return _queried(timeseries.Panel().fill_opacity(8).min(0), title, unit, queries, width)


def number(title: str, unit: str, query: Query, width: int = 4) -> stat.Panel:
    """The present value, large."""
    return _queried(stat.Panel(), title, unit, [query], width).height(5)


def heat(title: str, histogram: str, width: int = 12) -> heatmap.Panel:
    """How a histogram's values are spread over time."""
    expr = f'sum by (le) (increase({histogram}_bucket{{model=~"$model"}}[$__rate_interval]))'
    target = _target(Query(expr, "{{le}}"), "A").format(PromQueryFormat.HEATMAP)
    panel = heatmap.Panel().title(title).datasource(SOURCE).calculate(False)
    return panel.unit("s").span(width).height(HEIGHT).with_target(target)


def row(title: str) -> Row:
    """A heading."""
    return Row(title)


def quantiles(metric: str, *wanted: float) -> list[Query]:
    """Quantiles of a histogram of the chosen models, by model."""
    rate = f'sum by (model, le) (rate({metric}_bucket{{model=~"$model"}}[$__rate_interval]))'
    return [
        Query(f"histogram_quantile({q:g}, {rate})", f"{{{{model}}}} p{q * 100:g}") for q in wanted
    ]


def rate(metric: str, by: str = "model", where: str = 'model=~"$model"') -> str:
    """The rate of a counter, summed over all processes."""
    return f"sum by ({by}) (rate({metric}{{{where}}}[$__rate_interval]))"


def total(metric: str, by: str = "model", where: str = 'model=~"$model"') -> str:
    """A gauge, summed over all processes."""
    return f"sum by ({by}) ({metric}{{{where}}})"


def chosen(metric: str) -> str:
    """A gauge of each process, of the chosen models."""
    return f'{metric}{{model=~"$model"}}'


def filled(board: Dashboard, panels: Sequence[Any]) -> Dashboard:
    """``board`` with these panels and rows, from left to right."""
    for panel in panels:
        board = board.with_row(panel) if isinstance(panel, Row) else board.with_panel(panel)
    return board


def _queried(panel: P, title: str, unit: str, queries: Sequence[Query], width: int) -> P:
    panel = panel.title(title).unit(unit).datasource(SOURCE).span(width).height(HEIGHT)
    for name, query in zip("ABCDEFGH", queries, strict=False):
        panel = panel.with_target(_target(query, name))
    return panel


def _target(query: Query, name: str) -> prometheus.Dataquery:
    return prometheus.Dataquery().expr(query.expr).legend_format(query.legend).ref_id(name)
