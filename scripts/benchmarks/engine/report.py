"""Rounds of ``bench engine``: file format, keys and tables."""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path

from benchmarks.engine.measure import EngineResult
from benchmarks.engine.servers import CLUSTER, SERVE_LLM, VLLM_SERVE
from benchmarks.report import CellValue, Report, Table
from benchmarks.rounds import Summary

HEADLINE = 32
"""Number of concurrent requests of the keys without a suffix."""
RATIOS = {
    "ratio_vs_vllm_serve": (VLLM_SERVE, ">= 1.5"),
    "ratio_vs_serve_llm": (SERVE_LLM, ">= 1.8"),
}
READY_RATIO = ("ready_ratio_vs_vllm_serve", VLLM_SERVE, "<= 0.4")
COLUMNS = [
    field.name for field in fields(EngineResult) if field.name not in ("concurrent", "requests")
]


@dataclass(frozen=True, slots=True)
class EngineRound:
    """Results of one server in one round."""

    ready_s: float
    cells: tuple[EngineResult, ...]
    """One result per number of concurrent requests."""


Rounds = dict[str, list[EngineRound]]
"""Rounds by server."""


def load_rounds(path: Path | None) -> Rounds:
    """Load the rounds in a file; return none if it does not exist."""
    if path is None or not path.exists():
        return {}
    saved = json.loads(path.read_text(encoding="utf-8"))
    return {
        name: [
            EngineRound(one["ready_s"], tuple(EngineResult(**cell) for cell in one["cells"]))
            for one in rounds
        ]
        for name, rounds in saved.items()
    }


def save_rounds(path: Path | None, rounds: Rounds) -> None:
    """Save the rounds if there is a path."""
    if path is not None:
        plain = {name: [asdict(one) for one in of_server] for name, of_server in rounds.items()}
        path.write_text(json.dumps(plain, indent=1) + "\n", encoding="utf-8")


def make_report(rounds: Rounds) -> Report:
    """Return the ratios per round and the numbers of each server."""
    concurrent = sorted(
        {cell.concurrent for of_server in rounds.values() for cell in of_server[-1].cells}
    )
    keys: dict[str, Summary] = {}
    for num in sorted(concurrent, key=lambda num: num != HEADLINE):
        suffix = "" if num == HEADLINE else f"_at_{num}"
        for key, (peer, _) in RATIOS.items():
            if ratio := _ratio(rounds, peer, partial(_value, num, "tokens_s")):
                keys[f"{key}{suffix}"] = ratio
    if ratio := _ratio(rounds, READY_RATIO[1], lambda one: one.ready_s):
        keys[READY_RATIO[0]] = ratio
    goals = {key: goal for key, (_, goal) in RATIOS.items()} | {READY_RATIO[0]: READY_RATIO[2]}
    for name, of_server in rounds.items():
        keys |= _server_keys(name.replace("-", "_"), of_server)
    return Report(
        keys=keys,
        goals={key: goal for key, goal in goals.items() if key in keys},
        tables=[_ready_table(rounds), *(_table(rounds, num) for num in concurrent)],
        details={"engine": rounds},
        notes=[
            "Each server ran alone and was restarted in every round. From the second start on, "
            "vLLM's compiled code was in the user's cache.",
        ],
    )


def _ratio(
    rounds: Rounds, peer: str, value: Callable[[EngineRound], float | None]
) -> Summary | None:
    """Return the cluster's value over the peer's, in the rounds that have both."""
    pairs = zip(rounds.get(CLUSTER, []), rounds.get(peer, []), strict=False)
    ratios = tuple(a / b for ours, theirs in pairs if (a := value(ours)) and (b := value(theirs)))
    return Summary(ratios) if ratios else None


def _value(concurrent: int, column: str, one: EngineRound) -> float | None:
    return next((getattr(c, column) for c in one.cells if c.concurrent == concurrent), None)


def _summary(rounds: list[EngineRound], concurrent: int, column: str) -> Summary | None:
    values = tuple(v for one in rounds if (v := _value(concurrent, column, one)) is not None)
    return Summary(values) if values else None


def _server_keys(prefix: str, rounds: list[EngineRound]) -> dict[str, Summary]:
    values = {column: _summary(rounds, HEADLINE, column) for column in COLUMNS}
    ready = {"ready_s": Summary(tuple(one.ready_s for one in rounds))}
    return {f"{prefix}_{name}": value for name, value in (ready | values).items() if value}


def _ready_table(rounds: Rounds) -> Table:
    rows = [(name, Summary(tuple(r.ready_s for r in server))) for name, server in rounds.items()]
    return Table("Seconds from the start to the first token", ("server", "s"), rows)


def _table(rounds: Rounds, concurrent: int) -> Table:
    rows: list[list[CellValue]] = [
        [name, *(_summary(of_server, concurrent, column) for column in COLUMNS)]
        for name, of_server in rounds.items()
    ]
    columns = ("server", *(column.replace("_", " ") for column in COLUMNS))
    return Table(f"{concurrent} concurrent requests", columns, rows)
