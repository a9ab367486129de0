"""The rounds of ``bench engine``: kept in a file, and what they say together."""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path

from benchmarks.engine.cells import Cell
from benchmarks.engine.paths import CLUSTER, SERVE_LLM, VLLM_SERVE
from benchmarks.report import Cell as ReportCell
from benchmarks.report import Report, Table
from benchmarks.rounds import Summary

HEADLINE = 32
"""Concurrent requests of the keys that carry no number."""
RATIOS = {
    "ratio_vs_vllm_serve": (VLLM_SERVE, ">= 1.5"),
    "ratio_vs_serve_llm": (SERVE_LLM, ">= 1.8"),
}
READY_RATIO = ("ready_ratio_vs_vllm_serve", VLLM_SERVE, "<= 0.4")
NUMBERS = [one.name for one in fields(Cell) if one.name not in ("concurrent", "requests")]


@dataclass(frozen=True, slots=True)
class Round:
    """One server in one round."""

    ready_s: float
    cells: tuple[Cell, ...]


Found = dict[str, list[Round]]
"""The rounds of each server."""


def load(path: Path | None) -> Found:
    """The rounds in a file; none where there is no file."""
    if path is None or not path.exists():
        return {}
    kept = json.loads(path.read_text(encoding="utf-8"))
    return {
        name: [Round(one["ready_s"], tuple(Cell(**c) for c in one["cells"])) for one in rounds]
        for name, rounds in kept.items()
    }


def save(path: Path | None, found: Found) -> None:
    """Keep the rounds in a file, if any."""
    if path is not None:
        kept = {name: [asdict(one) for one in rounds] for name, rounds in found.items()}
        path.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")


def report(found: Found) -> Report:
    """Ratios round by round, and the numbers of each server."""
    concurrent = sorted({cell.concurrent for rounds in found.values() for cell in rounds[-1].cells})
    keys: dict[str, Summary] = {}
    for num in sorted(concurrent, key=lambda num: num != HEADLINE):
        suffix = "" if num == HEADLINE else f"_at_{num}"
        for key, (peer, _) in RATIOS.items():
            if ratio := _ratio(found, peer, partial(_number, num, "tokens_s")):
                keys[f"{key}{suffix}"] = ratio
    if ratio := _ratio(found, READY_RATIO[1], lambda one: one.ready_s):
        keys[READY_RATIO[0]] = ratio
    goals = {key: goal for key, (_, goal) in RATIOS.items()} | {READY_RATIO[0]: READY_RATIO[2]}
    for name, rounds in found.items():
        keys |= _keys_of(name.replace("-", "_"), rounds)
    return Report(
        keys=keys,
        goals={key: goal for key, goal in goals.items() if key in keys},
        tables=[_ready(found), *(_table(found, num) for num in concurrent)],
        details={"engine": found},
        notes=[
            "each server ran alone and was started anew in every round; vLLM's compiled code was "
            "in the user's cache from the second start on",
        ],
    )


def _ratio(found: Found, peer: str, number: Callable[[Round], float | None]) -> Summary | None:
    """The cluster's number over the peer's, in the rounds that have both."""
    pairs = zip(found.get(CLUSTER, []), found.get(peer, []), strict=False)
    ratios = tuple(a / b for one, two in pairs if (a := number(one)) and (b := number(two)))
    return Summary(ratios) if ratios else None


def _number(concurrent: int, name: str, one: Round) -> float | None:
    return next((getattr(c, name) for c in one.cells if c.concurrent == concurrent), None)


def _summary(rounds: list[Round], concurrent: int, name: str) -> Summary | None:
    numbers = tuple(n for one in rounds if (n := _number(concurrent, name, one)) is not None)
    return Summary(numbers) if numbers else None


def _keys_of(prefix: str, rounds: list[Round]) -> dict[str, Summary]:
    named = {name: _summary(rounds, HEADLINE, name) for name in NUMBERS}
    ready = {"ready_s": Summary(tuple(one.ready_s for one in rounds))}
    return {f"{prefix}_{name}": value for name, value in (ready | named).items() if value}


def _ready(found: Found) -> Table:
    rows = [(name, Summary(tuple(one.ready_s for one in rounds))) for name, rounds in found.items()]
    return Table("Seconds from the start to the first token", ("server", "s"), rows)


def _table(found: Found, concurrent: int) -> Table:
    rows: list[list[ReportCell]] = [
        [name, *(_summary(rounds, concurrent, number) for number in NUMBERS)]
        for name, rounds in found.items()
    ]
    columns = ("server", *(name.replace("_", " ") for name in NUMBERS))
    return Table(f"{concurrent} requests at a time", columns, rows)
