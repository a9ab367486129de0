"""Rounds of ``bench engine``: file format, keys and tables."""

import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path

from benchmarks.engine.measure import EngineResult
from benchmarks.engine.servers import (
    CLUSTER,
    IN_PROCESS,
    LLAMA_CPP,
    SERVE_LLM,
    SERVE_LLM_TUNED,
    TUNED_VLLM,
    VLLM,
)
from benchmarks.report import CellValue, Report, Table
from benchmarks.rounds import Summary

HEADLINE = 32
"""Number of concurrent requests of the keys without a suffix."""
RATIOS = {
    "ratio_vs_in_process": (IN_PROCESS, ">= 0.95"),
    "ratio_vs_vllm_serve": (VLLM, ">= 1.5"),
    "ratio_vs_llama_cpp": (LLAMA_CPP, ">= 1.0"),
    "ratio_vs_serve_llm": (SERVE_LLM, ">= 1.8"),
    "ratio_vs_tuned_serve_llm": (SERVE_LLM_TUNED, ">= 1.0"),
}
"""Peers of the throughput ratios, and the goals."""
TUNED_RATIO = "ratio_default_vs_tuned_vllm"
TTFT_RATIO = f"ttft_ratio_vs_tuned_vllm_at_{HEADLINE}"
BEST: dict[str, Callable[[Sequence[float]], float]] = {"tokens_s": max, "ttft_ms_p50": min}
"""Choice of the tuned peer's variant in each round, by column."""
READY_RATIO = ("ready_ratio_vs_vllm_serve", VLLM, "<= 0.4")
COLUMNS = [
    field.name for field in fields(EngineResult) if field.name not in ("concurrent", "requests")
]


@dataclass(frozen=True, slots=True)
class EngineRound:
    """Results of one server in one round."""

    ready_s: float
    cells: tuple[EngineResult, ...]
    """One result per number of concurrent requests."""
    command: str = ""
    scale_events: tuple[str, ...] = ()
    """Decisions of the cluster's autoscaler, with their reasons."""


Rounds = dict[str, list[EngineRound]]
"""Rounds by server."""


def load_rounds(path: Path | None) -> Rounds:
    """Load the rounds in a file; return none if it does not exist."""
    if path is None or not path.exists():
        return {}
    saved = json.loads(path.read_text(encoding="utf-8"))
    return {
        name: [
            EngineRound(
                one["ready_s"],
                tuple(EngineResult(**cell) for cell in one["cells"]),
                one.get("command", ""),
                tuple(one.get("scale_events", ())),
            )
            for one in rounds
        ]
        for name, rounds in saved.items()
    }


def save_rounds(path: Path | None, rounds: Rounds) -> None:
    """Save the rounds if there is a path."""
    if path is not None:
        plain = {name: [asdict(one) for one in of_server] for name, of_server in rounds.items()}
        path.write_text(json.dumps(plain, indent=1) + "\n", encoding="utf-8")


def make_report(rounds: Rounds, failures: Mapping[str, str] | None = None) -> Report:
    """Return the ratios per round and the numbers of each server.

    ``failures`` has the errors of servers that were left out from some round on.
    """
    concurrent = sorted(
        {cell.concurrent for of_server in rounds.values() for cell in of_server[-1].cells}
    )
    keys, goals = _ratio_keys(rounds, concurrent)
    for name, of_server in rounds.items():
        keys |= _server_keys(name.replace("-", "_"), of_server)
    return Report(
        keys=keys,
        goals=goals,
        tables=[_ready_table(rounds), *(_table(rounds, num) for num in concurrent)],
        details={"engine": rounds},
        values=_values(rounds, concurrent),
        commands={name: of_server[-1].command for name, of_server in rounds.items()},
        # Those of all runs that added rounds; the arguments are those of the last run.
        settings={"rounds": max(map(len, rounds.values()), default=0), "targets": list(rounds)},
        notes=[
            *(f"{name}: {of_server[-1].command}" for name, of_server in rounds.items()),
            *(
                f"{name} failed: {error.splitlines()[0]}"
                for name, error in (failures or {}).items()
            ),
            *(f"{name}, autoscaling: {event}" for name, event in _scale_events(rounds)),
            "ratio_default_vs_tuned_vllm: the fastest tuned variant of each round is the peer.",
            "Each server ran alone and was restarted in every round. From the second start on, "
            "vLLM's compiled code was in the user's cache.",
        ],
    )


def _ratio_keys(
    rounds: Rounds, concurrent: Sequence[int]
) -> tuple[dict[str, Summary], dict[str, str]]:
    """Return the ratios to the peers, and the goals of those that exist."""
    found: dict[str, tuple[Summary | None, str]] = {}
    for num in sorted(concurrent, key=lambda num: num != HEADLINE):
        tokens_s = partial(_value, num, "tokens_s")
        found[f"{TUNED_RATIO}_at_{num}"] = _tuned_ratio(rounds, num, "tokens_s"), ">= 1.0"
        suffix = "" if num == HEADLINE else f"_at_{num}"
        for key, (peer, goal) in RATIOS.items():
            found[f"{key}{suffix}"] = _ratio(rounds, peer, tokens_s), goal
    found[TTFT_RATIO] = _tuned_ratio(rounds, HEADLINE, "ttft_ms_p50"), "<= 1.0"
    found[READY_RATIO[0]] = _ratio(rounds, READY_RATIO[1], lambda one: one.ready_s), READY_RATIO[2]
    keys = {key: ratio for key, (ratio, _) in found.items() if ratio is not None}
    return keys, {key: goal for key, (_, goal) in found.items() if key in keys}


def _tuned_ratio(rounds: Rounds, num: int, column: str) -> Summary | None:
    """Return the cluster's value over the best one of vLLM's tuned variants in each round."""
    ours = [_value(num, column, one) for one in rounds.get(CLUSTER, [])]
    pairs = zip(ours, _best_tuned(rounds, num, column), strict=False)
    ratios = tuple(a / b for a, b in pairs if a and b)
    return Summary(ratios) if ratios else None


def _best_tuned(rounds: Rounds, num: int, column: str) -> list[float | None]:
    """Return the best value of vLLM's tuned variants by round; None if it has none."""
    variants = [rounds[name] for name in TUNED_VLLM if name in rounds]
    by_round = [
        [found for one in of_round if one and (found := _value(num, column, one))]
        for of_round in itertools.zip_longest(*variants)
    ]
    return [BEST[column](found) if found else None for found in by_round]


def _values(rounds: Rounds, concurrent: Sequence[int]) -> dict[str, dict[str, Summary]]:
    """Return the values behind the ratios to vLLM; the tuned one is the best of each round."""
    values: dict[str, dict[str, Summary]] = {}
    for num, column in itertools.product(concurrent, BEST):
        tuned = tuple(found for found in _best_tuned(rounds, num, column) if found)
        sides = {
            "ours": _summary(rounds.get(CLUSTER, []), num, column),
            "tuned": Summary(tuned) if tuned else None,
            "default": _summary(rounds.get(VLLM, []), num, column),
        }
        values[f"{column}_at_{num}"] = {side: found for side, found in sides.items() if found}
    return values


def _scale_events(rounds: Rounds) -> list[tuple[str, str]]:
    return [
        (f"{name}, round {number}", event.removeprefix("autoscaling: "))
        for name, of_server in rounds.items()
        for number, one in enumerate(of_server, start=1)
        for event in one.scale_events
    ]


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
