"""``tandem top``: live view of the routers, from the data of ``/dashboard``."""

import time
from collections.abc import Mapping

from rich.console import Console, Group
from rich.live import Live
from rich.table import Column, Table
from rich.text import Text

from cluster.cli.defaults import router_url
from cluster.cli.replicas import DashboardData, replica_table, share
from cluster.cli.router_client import DATA_PATH, RouterClient, connect
from cluster.errors import TandemError

SPARKLINE_S = 30
MAX_FAILURES = 8
MAX_DECISIONS = 5
# Terminal widths in characters: below NARROW, medians and the failures' type and path are omitted;
# below WIDE, sparklines are.
NARROW, WIDE = 110, 150
_BLOCKS = " ▁▂▃▄▅▆▇█"


def run(url: str | None, key: str | None, *, every_s: float, once: bool) -> None:
    """Update the view every ``every_s`` seconds until Ctrl-C, or print it once.

    Raises:
        TandemError: the first request fails; later errors are displayed.
    """
    console = Console()
    with connect(router_url(url), key) as router:
        data = _fetch(router)
        first = frame(data, console.width)
        if once:
            console.print(first)
            return
        with Live(first, console=console, screen=True, auto_refresh=False) as live:
            try:
                while True:
                    time.sleep(every_s)
                    live.update(_next(router, data, console.width), refresh=True)
            except KeyboardInterrupt:
                return


def _fetch(router: RouterClient) -> DashboardData:
    data: DashboardData = router.get(f"{DATA_PATH}?since={int(time.time()) - SPARKLINE_S}")
    return data


def _next(router: RouterClient, last: DashboardData, width: int) -> Group:
    try:
        return frame(_fetch(router), width)
    except TandemError as error:
        message = Text(f"{error}; showing the last data received", style="red")
        return Group(message, frame(last, width))


def frame(data: DashboardData, width: int) -> Group:
    """Render the response of ``/dashboard/data`` for a terminal of ``width`` characters."""
    parts = _models(data, width), replica_table(data), _failures(data, width), _decisions(data)
    return Group(_head(data), *(line for part in parts if part for line in (part, "")))


def _head(data: DashboardData) -> Text:
    summary = f"  {_clock(data['now'])}  {len(data['routers'])} router(s)"
    text = Text.assemble(("tandem top", "bold"), summary)
    if silent := [name for name, responds in data["routers"].items() if not responds]:
        text.append(f"  no response from {', '.join(silent)}", style="red")
    return text


def _models(data: DashboardData, width: int) -> Table:
    table = Table(Column("model", no_wrap=True), box=None, pad_edge=False, collapse_padding=True)
    for name, seconds in sorted(data["rows"].items(), key=lambda item: item[0] == ""):
        cells = _cells(data, seconds, data["levels"][name], width)
        if not table.rows:
            for title in cells:
                table.add_column(title, justify="right", no_wrap=True)
        table.add_row(name or "all", *cells.values())
    return table


def _cells(
    data: DashboardData, rows: list[list[float | None]], levels: Mapping[str, float], width: int
) -> dict[str, str | Text]:
    """Return the values of the last second by column title."""
    now = dict(zip(data["columns"], rows[-1], strict=True)) if rows else {}
    failed = now.get("failed")
    cells: dict[str, str | Text] = {
        "req/s": _number(now.get("requests")),
        "failed/s": Text(_number(failed), style="red" if failed else ""),
        "tok/s": _number(now.get("completion_tokens")),
    }
    for title, name in (("TTFT", "ttft"), ("ITL", "itl")):
        if width >= NARROW:
            cells[f"{title} p50"] = _seconds(now.get(f"{name}_p50"))
        cells[f"{title} p99"] = _seconds(now.get(f"{name}_p99"))
    cells["e2e p90"] = _seconds(now.get("total_p90"))
    cells["in flight"], cells["queued"] = str(levels["in_flight"]), str(levels["queued"])
    cells["KV"] = share(levels["kv_cache"])
    if width >= WIDE:
        tokens = data["columns"].index("completion_tokens")
        past = [row[tokens] or 0.0 for row in rows[-SPARKLINE_S:]]
        cells[f"tok/s, {SPARKLINE_S} s"] = sparkline(past)
    return cells


def _failures(data: DashboardData, width: int) -> Table | str:
    if not data["failures"]:
        return "no failed requests"
    fields = {"type": "type", "model": "model", "path": "route", "request id": "id"}
    if width < NARROW:
        del fields["type"], fields["path"]
    titles = ("last failures", "status", *fields)
    table = Table(*(Column(title, no_wrap=True) for title in titles), box=None, pad_edge=False)
    for failure in data["failures"][:MAX_FAILURES]:
        cells = (Text(failure[name]) for name in fields.values())
        table.add_row(_clock(failure["time"]), str(failure["status"]), *cells)
    return table


def _decisions(data: DashboardData) -> Table | None:
    if not data["decisions"]:
        return None
    titles = (Column(title, no_wrap=True) for title in ("autoscaling", "pool", "replicas"))
    table = Table(*titles, "reason", box=None, pad_edge=False)
    for change in data["decisions"][:MAX_DECISIONS]:
        replicas = f"{change['before']} → {change['target']}"
        cells = (change["pool"], replicas, f"{change['cause']}: {change['reason']}")
        table.add_row(_clock(change["time"]), *map(Text, cells))
    return table


def sparkline(values: list[float]) -> str:
    highest = max(values, default=0.0)
    if highest <= 0:
        return _BLOCKS[1] * len(values)
    last = len(_BLOCKS) - 1
    return "".join(_BLOCKS[max(1, round(value / highest * last))] for value in values)


def _clock(unix: float) -> str:
    return time.strftime("%H:%M:%S", time.localtime(unix))


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:,.1f}" if 0 < value < 10 else f"{value:,.0f}"


def _seconds(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:.2f} s" if value >= 1 else f"{value * 1e3:.{1 if value < 0.1 else 0}f} ms"
