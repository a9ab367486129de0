"""Dashboards from JSON files, in the formats of Grafana 7 (Ray's) and 11 (Tandem's)."""

import json
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

MAX_FILE_BYTES = 4_000_000
MAX_FILES = 100
ALL = "$__all"
"""Value of a variable that stands for all values."""
logger = logging.getLogger(__name__)

_KINDS = {
    "graph": "series",
    "timeseries": "series",
    "heatmap": "heatmap",
    "stat": "values",
    "gauge": "values",
    "bargauge": "values",
    "piechart": "table",
    "table": "table",
    "row": "row",
}
_LABEL = re.compile(r"\{\{\s*(.*?)\s*\}\}")


@dataclass(frozen=True, slots=True)
class Unit:
    """Format of a panel's values."""

    scale: str
    """Format in ``panels.js``: ``duration`` (of seconds), ``binary``, ``si`` or ``plain``."""
    suffix: str = ""
    factor: float = 1.0
    """Factor by which values are multiplied first."""


UNITS = {
    "": Unit("si"),
    "none": Unit("si"),
    "short": Unit("si"),
    "s": Unit("duration"),
    "seconds": Unit("duration"),
    "ms": Unit("duration", factor=1e-3),
    "bytes": Unit("binary", "B"),
    "Bps": Unit("si", "B/s"),
    "GBs": Unit("si", "B/s", 1e9),
    "percent": Unit("plain", "%"),
    "%": Unit("plain", "%"),
    "percentunit": Unit("plain", "%", 100.0),
    "reqps": Unit("si", "req/s"),
    "qps": Unit("si", "req/s"),
    "ops": Unit("si", "ops/s"),
    "rowsps": Unit("si", "rows/s"),
    "watt": Unit("si", "W"),
    "mwatt": Unit("si", "W", 1e-3),
    "joule": Unit("si", "J"),
    "celsius": Unit("plain", "°C"),
}
"""Grafana's units in the dashboards; Ray also uses words as units, such as ``tasks``."""


@dataclass(frozen=True, slots=True)
class Target:
    """Query of a panel."""

    expr: str
    legend: str

    def name_series(self, labels: Mapping[str, str]) -> str:
        """Return the name of a series: the legend with its labels, by default all of them."""

        def value(match: re.Match[str]) -> str:
            names = [name.strip() for name in match[1].split(",")]
            return ", ".join(labels[name] for name in names if labels.get(name))

        if name := _LABEL.sub(value, self.legend).strip():
            return name
        pairs = ", ".join(f'{k}="{v}"' for k, v in sorted(labels.items()) if k != "__name__")
        return labels.get("__name__", "") + (f"{{{pairs}}}" if pairs else "") or "value"


@dataclass(frozen=True, slots=True)
class Override:
    """Appearance of the series whose name matches."""

    pattern: re.Pattern[str]
    options: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Panel:
    """Panel of a dashboard, or the heading of a row."""

    id: int
    kind: str
    """``series``, ``heatmap``, ``values``, ``table`` or ``row``."""
    title: str
    description: str
    unit: Unit
    stacked: bool
    minimum: float | None
    targets: tuple[Target, ...]
    overrides: tuple[Override, ...]
    position: Mapping[str, int]
    """Place in a grid of 24 columns: ``x``, ``y``, ``w``, ``h``."""
    collapsed: bool = False
    """True for a row whose panels are hidden at first."""
    row: int | None = None
    """Id of the collapsed row that contains the panel."""

    def appearance(self, name: str) -> dict[str, Any]:
        """Return color, dashes, hidden and stacked of the series with this name."""
        found = {"stacked": self.stacked, "color": None, "dashed": False, "hidden": False}
        names = {"stack": "stacked", "dashes": "dashed", "hiddenSeries": "hidden", "color": "color"}
        for override in self.overrides:
            if override.pattern.search(name):
                known = override.options.items()
                found |= {names[key]: value for key, value in known if key in names}
        return found


@dataclass(frozen=True, slots=True)
class Variable:
    """Variable of a dashboard."""

    name: str
    kind: str
    """``query``, ``custom``, ``interval`` or ``datasource``."""
    definition: str
    all_value: str | None
    include_all: bool
    options: tuple[str, ...]
    """Allowed values of a ``custom`` or ``interval`` variable."""
    default: tuple[str, ...]

    @property
    def is_fixed(self) -> bool:
        """True if only ``options`` are allowed, so that they may stand outside of quotes."""
        return self.kind != "query"


@dataclass(frozen=True, slots=True)
class Dashboard:
    """Dashboard with its panels in reading order."""

    uid: str
    title: str
    folder: str
    variables: tuple[Variable, ...]
    panels: tuple[Panel, ...]
    by_id: Mapping[int, Panel] = field(repr=False)


class Library:
    """Dashboards of several folders, read again when a file changes."""

    def __init__(self, folders: Mapping[str, Path]) -> None:
        self._folders = folders
        self._files: list[tuple[str, Path, int]] = []
        self._dashboards: dict[str, Dashboard] = {}

    def dashboards(self) -> Mapping[str, Dashboard]:
        """Return the dashboards by uid."""
        files = [
            (folder, path, path.stat().st_mtime_ns)
            for folder, directory in self._folders.items()
            for path in sorted(directory.glob("*.json"))[:MAX_FILES]
        ]
        if files != self._files:
            found = (self._read(folder, path) for folder, path, _ in files)
            self._dashboards = {board.uid: board for board in found if board is not None}
            self._files = files
        return self._dashboards

    def _read(self, folder: str, path: Path) -> Dashboard | None:
        try:
            if path.stat().st_size > MAX_FILE_BYTES:
                raise ValueError(f"larger than {MAX_FILE_BYTES} bytes")
            return parse_dashboard(json.loads(path.read_text(encoding="utf-8")), folder)
        except (OSError, ValueError, TypeError, KeyError, AttributeError, re.error) as error:
            logger.warning("%s is no dashboard: %r", path, error)
            return None


def parse_dashboard(document: Mapping[str, Any], folder: str) -> Dashboard:
    """Return the dashboard; panels without an id get the next free one, as in Grafana."""
    raw = list(_flatten(document["panels"]))
    taken = {panel["id"] for panel, _ in raw if panel.get("id")}
    free = iter(number for number in range(1, len(raw) + len(taken) + 1) if number not in taken)
    panels: list[Panel] = []
    for panel, is_nested in raw:
        row = panels_row(panels) if is_nested else None
        panels.append(_panel(panel, panel.get("id") or next(free), row))
    variables = document.get("templating", {}).get("list", [])
    return Dashboard(
        uid=document["uid"],
        title=document["title"],
        folder=folder,
        variables=tuple(_variable(each) for each in variables if each["type"] != "datasource"),
        panels=tuple(panels),
        by_id={panel.id: panel for panel in panels},
    )


def panels_row(panels: Sequence[Panel]) -> int:
    """Return the id of the last row."""
    return next(panel.id for panel in reversed(panels) if panel.kind == "row")


def _flatten(panels: Sequence[Mapping[str, Any]]) -> Iterator[tuple[Mapping[str, Any], bool]]:
    """Yield all panels, and whether a collapsed row contains them."""
    for panel in panels:
        yield panel, False
        for nested in panel.get("panels") or ():
            yield nested, True


def _panel(panel: Mapping[str, Any], number: int, row: int | None) -> Panel:
    defaults = panel.get("fieldConfig", {}).get("defaults", {})
    stacking = defaults.get("custom", {}).get("stacking", {}).get("mode")
    axis = next(iter(panel.get("yaxes") or [{}]))
    minimum = defaults.get("min", axis.get("min"))
    targets = panel.get("targets") or ()
    unit = defaults.get("unit") or axis.get("format") or ""
    return Panel(
        id=number,
        kind=_KINDS.get(panel["type"], "unsupported"),
        title=panel.get("title") or "",
        description=panel.get("description") or "",
        unit=UNITS.get(unit) or Unit("si", unit),
        stacked=bool(panel.get("stack")) or stacking == "normal",
        minimum=None if minimum is None else float(minimum),
        targets=tuple(Target(each["expr"], each.get("legendFormat") or "") for each in targets),
        overrides=tuple(_override(each) for each in panel.get("seriesOverrides") or ()),
        position={side: int(panel["gridPos"][side]) for side in ("x", "y", "w", "h")},
        collapsed=bool(panel.get("collapsed")),
        row=row,
    )


def _override(override: Mapping[str, Any]) -> Override:
    alias = override["alias"]
    is_pattern = len(alias) > 1 and alias[0] == alias[-1] == "/"
    return Override(re.compile(alias[1:-1] if is_pattern else f"^{re.escape(alias)}$"), override)


def _variable(variable: Mapping[str, Any]) -> Variable:
    query = variable.get("query") or ""
    listed = (option["value"] for option in variable.get("options") or ())
    options = tuple(str(value) for value in listed if value != ALL)
    value = (variable.get("current") or {}).get("value")
    current = tuple(value) if isinstance(value, list) else (value,) if value else ()
    include_all = bool(variable.get("includeAll"))
    return Variable(
        name=variable["name"],
        kind=variable["type"],
        definition=query["query"] if isinstance(query, dict) else query,
        all_value=variable.get("allValue"),
        include_all=include_all,
        options=options,
        default=current or ((ALL,) if include_all else options[:1]),
    )
