"""Dashboards, queries and limits of the stand-in for Grafana, without HTTP."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from cluster.monitoring import panels
from cluster.monitoring.panels import queries
from cluster.monitoring.panels.content import _buckets as buckets
from cluster.monitoring.panels.dashboards import UNITS, Library, Target, parse_dashboard
from cluster.monitoring.panels.queries import BadRequestError, parse_range, select, substitute

NOW = 1_000_000.0
TANDEM = Path(panels.__file__).parents[1] / "grafana" / "dashboards"


def query_variable(name: str, **more: Any) -> dict[str, Any]:
    definition = f"label_values(up, {name})"
    return {"name": name, "type": "query", "query": {"query": definition}, **more}


def custom_variable(name: str, *options: str, **more: Any) -> dict[str, Any]:
    listed = [{"value": option} for option in options]
    return {"name": name, "type": "custom", "options": listed, **more}


def document(*more: dict[str, Any], variables: Any = ()) -> dict[str, Any]:
    panel = {"type": "graph", "gridPos": {"x": 0, "y": 0, "w": 12, "h": 8}, "title": "one"}
    every = [{**panel, **each} for each in more] or [panel]
    return {"uid": "u", "title": "t", "panels": every, "templating": {"list": list(variables)}}


def run(expr: str, *variables: dict[str, Any], **requested: list[str]) -> str:
    board = parse_dashboard(document(variables=variables), "f")
    times = parse_range("now-1h", "now", 120, NOW)
    return substitute(expr, board, select(board, requested), times)


SESSION = query_variable("SessionName", includeAll=True, allValue=".+")
INTERVAL = custom_variable("interval", "30s", "5m", current={"value": "5m"})


@pytest.mark.parametrize(
    ("expr", "requested", "expected"),
    [
        ('a{s=~"$SessionName"}', {}, 'a{s=~".+"}'),
        ('a{s=~"$SessionName"}', {"SessionName": ["$__all"]}, 'a{s=~".+"}'),
        ('a{s=~"${SessionName}"}', {"SessionName": ["undefined"]}, 'a{s=~".+"}'),
        ('a{s=~"$SessionName"}', {"SessionName": ["x_1"]}, 'a{s=~"x_1"}'),
        ('a{s=~"[[SessionName]]"}', {"SessionName": ["a", "b.c"]}, r'a{s=~"(a|b\\.c)"}'),
        ("a{s=~'$SessionName'}", {"SessionName": ["it's"]}, r"a{s=~'it\'s'}"),
        ("rate(a[$interval])", {}, "rate(a[5m])"),
        ("rate(a[$interval])", {"interval": ["30s"]}, "rate(a[30s])"),
        ("rate(a[$__rate_interval])", {}, "rate(a[40s])"),
        ("a[$__range]", {}, "a[3600s]"),
        ("a[${__interval}]", {}, "a[30s]"),
    ],
)
def test_variables_are_replaced(expr: str, requested: dict[str, list[str]], expected: str) -> None:
    assert run(expr, SESSION, INTERVAL, **requested) == expected


def test_all_without_a_pattern_lists_the_options() -> None:
    kind = custom_variable("kind", "$__all", "head", "worker", includeAll=True)
    assert run('a{k=~"$kind"}', kind) == 'a{k=~"(head|worker)"}'
    assert run('a{k=~"$kind"}', kind, kind=["head"]) == 'a{k=~"head"}'


@pytest.mark.parametrize("value", ['"} or vector(1) #', "x\\", "'", "$__range", "a|b", "{{x}}"])
def test_a_value_cannot_leave_its_string(value: str) -> None:
    found = run('a{s=~"$SessionName"} + 1', SESSION, SessionName=[value])
    inner = found.removeprefix('a{s=~"').removesuffix('"} + 1')
    # Decoding the string as PromQL and then as a regular expression gives the value again.
    assert json.loads(f'"{inner}"'.replace("\\'", "'")).replace("\\", "") == value.replace("\\", "")
    assert '"' not in inner.replace('\\"', "")
    assert not inner.replace("\\\\", "").endswith("\\")


@pytest.mark.parametrize(
    ("expr", "requested", "reason"),
    [
        ("rate(a[$interval])", {"interval": ["1h] or vector(1)"]}, "must be one of 30s, 5m"),
        ("sum by ($SessionName) (a)", {"SessionName": ["x"]}, "outside of quotes"),
        ("a{x=~`$SessionName`}", {}, "raw string"),
        ('a{x=~"$unknown"}', {}, "unknown variable unknown"),
        ("a", {"SessionName": ["x"] * 51}, "more than 50 values"),
        ("a", {"SessionName": ["x" * 301]}, "more than 300 characters"),
        ("a", {"SessionName": ["a\nb"]}, "control character"),
    ],
)
def test_other_values_are_refused(expr: str, requested: dict[str, list[str]], reason: str) -> None:
    with pytest.raises(BadRequestError, match=reason):
        run(expr, SESSION, INTERVAL, **requested)


def test_ranges_are_multiples_of_the_step_and_bounded() -> None:
    times = parse_range("now-5m", "now", 120, NOW)
    assert (times.step, times.points) == (10, 31)
    week = parse_range("now-7d", "now", 10_000, NOW)
    assert week.points <= queries.MAX_POINTS
    assert week.start % week.step == week.end % week.step == 0
    assert parse_range("1000", "600000", 100, NOW).end == 600
    assert parse_range("now-30d", "now", 1, NOW).points >= queries.MIN_POINTS


@pytest.mark.parametrize(
    ("start", "end"),
    [("now", "now"), ("now-40d", "now"), ("yesterday", "now"), ("now-1y", "now"), ("now", "-1")],
)
def test_wrong_ranges_are_refused(start: str, end: str) -> None:
    with pytest.raises(BadRequestError):
        parse_range(start, end, 100, NOW)


def test_panels_without_an_id_get_the_next_free_one() -> None:
    row = {"type": "row", "id": 0, "collapsed": True, "panels": [document()["panels"][0]]}
    board = parse_dashboard(document({"id": 2}, {}, row, {}), "f")
    assert [(panel.id, panel.row) for panel in board.panels] == [
        (2, None), (1, None), (3, None), (4, 3), (5, None)
    ]  # fmt: skip


def test_series_have_names_and_appearances() -> None:
    labels = {"__name__": "up", "application": "tandem", "route": "/"}
    assert Target("", "{{application, route}}").name_series(labels) == "tandem, /"
    assert Target("", "{{ route }}: {{missing}}").name_series(labels) == "/:"
    assert Target("", "").name_series(labels) == 'up{application="tandem", route="/"}'
    assert Target("", "{{missing}}").name_series({}) == "value"
    overrides = [
        {"alias": "MAX", "dashes": True, "color": "#1F60C4", "stack": False},
        {"alias": "/FAILED|DEAD/", "hiddenSeries": True},
    ]
    (panel,) = parse_dashboard(document({"stack": True, "seriesOverrides": overrides}), "f").panels
    assert panel.appearance("MAX")["dashed"]
    assert not panel.appearance("MAX")["stacked"]
    assert panel.appearance("MAX + 1") == {
        "stacked": True, "color": None, "dashed": False, "hidden": False
    }  # fmt: skip
    assert panel.appearance("2 DEAD")["hidden"]


def test_units_of_the_dashboards_have_a_format() -> None:
    assert UNITS["percentunit"].factor == 100
    assert UNITS["ms"].scale == "duration"
    defaults = {"fieldConfig": {"defaults": {"unit": "placement groups"}}}
    (panel,) = parse_dashboard(document(defaults), "f").panels
    assert (panel.unit.scale, panel.unit.suffix) == ("si", "placement groups")


def test_cumulative_buckets_become_counts() -> None:
    found = buckets(
        [
            {"name": "+Inf", "values": [5.0, None]},
            {"name": "0.5", "values": [2.0, 1.0]},
            {"name": "10", "values": [5.0, 4.0]},
        ]
    )
    assert [(each["name"], each["values"]) for each in found] == [
        ("0.5", [2.0, 1.0]), ("10", [3.0, 3.0]), ("+Inf", [0.0, None])
    ]  # fmt: skip
    assert buckets([]) == []


def test_changed_files_are_read_again_and_others_skipped(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    library = Library({"Mine": tmp_path, "Absent": tmp_path / "absent"})
    assert library.dashboards() == {}
    file.write_text(json.dumps(document()))
    (tmp_path / "b.json").write_text("{")
    (tmp_path / "c.json").write_text(json.dumps({"panels": [{}]}))
    assert library.dashboards()["u"].title == "t"
    file.write_text(json.dumps({**document(), "title": "new"}))
    os.utime(file, ns=(1, 1))
    assert library.dashboards()["u"].title == "new"


def test_tandems_dashboards_are_read() -> None:
    boards = Library({"Tandem": TANDEM}).dashboards()
    assert len(boards) == len(list(TANDEM.glob("*.json")))
    for board in boards.values():
        ids = [panel.id for panel in board.panels]
        assert len(set(ids)) == len(ids)
        assert not [panel.title for panel in board.panels if panel.kind == "unsupported"]
        times = parse_range("now-1h", "now", 100, NOW)
        for panel in board.panels:
            for target in panel.targets:
                assert "$" not in substitute(target.expr, board, select(board, {}), times)
