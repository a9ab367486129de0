"""``tandem usage``."""

import json
from collections import defaultdict
from typing import Any
from urllib.parse import urlencode

from rich.console import Console
from rich.table import Table

from cluster.cli.defaults import router_url
from cluster.cli.router_client import connect

USAGE_PATH = "/v1/usage"
_SUMS = ("requests", "prompt_tokens", "cached_tokens", "completion_tokens", "joules", "cost")


def run(query: dict[str, str | None], url: str | None, key: str | None, *, as_json: bool) -> None:
    """Print the usage by tenant and model, or with ``as_json`` the router's answer, by hour.

    Raises:
        TandemError: No router responds, or it rejects the key or the query.
    """
    given = {name: value for name, value in query.items() if value is not None}
    with connect(router_url(url), key) as router:
        usage = router.get(f"{USAGE_PATH}?{urlencode(given)}" if given else USAGE_PATH)
    if as_json:
        print(json.dumps(usage, indent=2))
    else:
        Console(highlight=False).print(_table(usage))


def _table(usage: dict[str, Any]) -> Table:
    table = Table("tenant", "model", box=None, pad_edge=False)
    titles = ("requests", "prompt", "cached", "completion", "kJ", f"cost {usage['currency'] or ''}")
    for title in titles:
        table.add_column(title.strip(), justify="right", no_wrap=True)
    sums: dict[tuple[str, str], list[float]] = defaultdict(lambda: [0.0] * len(_SUMS))
    for row in usage["data"]:
        group = sums[row["tenant"], row["model"]]
        for index, name in enumerate(_SUMS):
            group[index] += row[name] or 0.0
    for (tenant, model), values in sorted(sums.items()):
        *counts, joules, cost = values
        cells = [f"{value:,.0f}" for value in counts]
        table.add_row(tenant, model, *cells, _amount(joules / 1e3), _amount(cost))
    return table


def _amount(value: float) -> str:
    return f"{value:,.2f}" if value else "–"
