"""``tandem classify``."""

import json
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from cluster.cli.http import connect
from cluster.cli.paths import router_url


def run(
    texts: Sequence[str], model: str | None, url: str | None, key: str | None, *, as_json: bool
) -> None:
    """Print one line for each text: its label and its score."""
    body = {"input": list(texts), **({"model": model} if model else {})}
    with connect(router_url(url), key) as http:
        answer = http.post("/classify", body)
    if as_json:
        print(json.dumps(answer, indent=2))
        return
    table = Table.grid(padding=(0, 2))
    for text, row in zip(texts, answer["data"], strict=True):
        table.add_row(row["label"], f"{row['score']:.3f}", text)
    Console().print(table, markup=False, highlight=False)
