"""``tandem top``: the routers' last seconds on the terminal, as ``/dashboard`` has them."""

import time
from collections.abc import Mapping
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from cluster.cli.http import Connection, connect
from cluster.cli.paths import router_url
from cluster.errors import TandemError

PATH = "/dashboard/data"
SPARK_S = 30
"""How much of the past a line of blocks shows."""
MAX_FAILURES = 8
MAX_DECISIONS = 5
_BLOCKS = " ▁▂▃▄▅▆▇█"

Data = Mapping[str, Any]


def run(url: str | None, key: str | None, *, every_s: float, once: bool) -> None:
    """Show a frame every ``every_s`` seconds until Ctrl-C; with ``once``, one.

    Raises:
        TandemError: the router does not answer, or refuses, at the start; later that is shown.
    """
    console = Console()
    with connect(router_url(url), key) as router:
        data = _ask(router)
        if once:
            console.print(frame(data))
            return
        with Live(frame(data), console=console, screen=True, auto_refresh=False) as live:
            try:
                while True:
                    time.sleep(every_s)
                    live.update(_next(router, data), refresh=True)
            except KeyboardInterrupt:
                return


def _ask(router: Connection) -> Data:
    found: Data = router.get(f"{PATH}?since={int(time.time()) - SPARK_S}")
    return found


def _next(router: Connection, last: Data) -> Group:
    try:
        return frame(_ask(router))
    except TandemError as error:
        return Group(Text(f"{error}; these are the last figures", style="red"), frame(last))


def frame(data: Data) -> Group:
    """One frame of what ``/dashboard/data`` answered."""
    parts = _models(data), _replicas(data), _failures(data), _decisions(data)
    return Group(_head(data), *(line for part in parts if part for line in (part, "")))


def _head(data: Data) -> Text:
    silent = [name for name, answers in data["routers"].items() if not answers]
    text = Text.assemble(
        ("tandem top", "bold"), f"  {_clock(data['now'])}  {len(data['routers'])} router(s)"
    )
    if silent:
        text.append(f"  no answer from {', '.join(silent)}", style="red")
    return text


def _models(data: Data) -> Table:
    table = Table(box=None, pad_edge=False)
    table.add_column("model", no_wrap=True)
    titles = ("req/s", "failed/s", "tok/s", "TTFT p50", "p99", "ITL p50", "p99", "e2e p90")
    for title in (*titles, "ongoing", "queued", "KV"):
        table.add_column(title, justify="right", no_wrap=True)
    table.add_column(f"tok/s, {SPARK_S} s", no_wrap=True)
    for name, rows in sorted(data["rows"].items(), key=lambda item: item[0] == ""):
        table.add_row(name or "all", *_cells(data, rows, data["levels"][name]))
    return table


def _cells(
    data: Data, rows: list[list[float | None]], levels: Mapping[str, float]
) -> list[str | Text]:
    now = dict(zip(data["columns"], rows[-1], strict=True)) if rows else {}
    tokens = data["columns"].index("completion_tokens")
    failed = now.get("failed")
    return [
        _number(now.get("requests")),
        Text(_number(failed), style="red" if failed else ""),
        _number(now.get("completion_tokens")),
        *(_seconds(now.get(name)) for name in ("ttft_p50", "ttft_p99", "itl_p50", "itl_p99")),
        _seconds(now.get("total_p90")),
        str(levels["ongoing"]),
        str(levels["queued"]),
        _share(levels["kv_cache"]),
        sparkline([row[tokens] or 0.0 for row in rows[-SPARK_S:]]),
    ]


def _replicas(data: Data) -> Table:
    table = Table(box=None, pad_edge=False)
    table.add_column("replica", no_wrap=True)
    for title in ("model", "link"):
        table.add_column(title)
    for title in ("ongoing", "in a batch", "waiting", "KV"):
        table.add_column(title, justify="right")
    for name, pool in data["pools"].items():
        for replica in pool["replicas"]:
            levels = (str(replica[key]) for key in ("ongoing", "running", "waiting"))
            state = Text(replica["state"], style="" if replica["state"] == "linked" else "yellow")
            table.add_row(replica["id"], name, state, *levels, _share(replica["kv_cache"]))
    return table


def _failures(data: Data) -> Table | str:
    if not data["failures"]:
        return "no request failed or was refused"
    table = Table(box=None, pad_edge=False)
    for title in ("last failures", "status", "type", "model", "path", "request id"):
        table.add_column(title, no_wrap=True)
    for failure in data["failures"][:MAX_FAILURES]:
        told = (failure["type"], failure["model"], failure["route"], failure["id"])
        table.add_row(_clock(failure["time"]), str(failure["status"]), *map(Text, told))
    return table


def _decisions(data: Data) -> Table | None:
    if not data["decisions"]:
        return None
    table = Table(box=None, pad_edge=False)
    for title in ("autoscaling", "pool", "replicas", "reason"):
        table.add_column(title, no_wrap=True)
    for change in data["decisions"][:MAX_DECISIONS]:
        replicas = f"{change['before']} → {change['target']}"
        told = (change["pool"], replicas, f"{change['cause']}: {change['reason']}")
        table.add_row(_clock(change["time"]), *map(Text, told))
    return table


def sparkline(values: list[float]) -> str:
    """One block for each value, as high as it is beside the highest."""
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


def _share(value: float | None) -> str:
    return "–" if value is None else f"{value:.0%}"
