"""CPU time of five hot paths in two commits, measured in turn (A, B, A, B, ...).

Each commit is checked out into a temporary git worktree and runs the same probes in this virtual
environment, one process at a time. CPU seconds depend less on other load than wall time. Three
rounds take two to four minutes.
"""

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from benchmarks.endpoint import TargetError
from benchmarks.report import Report, Table, print_progress
from benchmarks.rounds import Summary
from benchmarks.targets.home import ROOT

PROBES = Path(__file__).with_name("probes.py")
TIMEOUT_S = 120.0
WORSE = 1.05
"""Ratio above which a key is called slower, if it is above it in every round."""

Values = Mapping[str, Sequence[float]]
"""Value of each key, one per round."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("before", metavar="A", help="commit to compare with")
    parser.add_argument("after", metavar="B", help="commit to judge")


def run(args: argparse.Namespace) -> Report:
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bench-regress-")))
        trees = [
            stack.enter_context(_worktree(commit, folder / name))
            for commit, name in ((args.before, "a"), (args.after, "b"))
        ]
        measured = _measure(trees, args.rounds)
    return make_report(*measured, commits=(args.before, args.after))


def _measure(trees: Sequence[Path], num_rounds: int) -> tuple[Values, Values]:
    values: tuple[dict[str, list[float]], ...] = (defaultdict(list), defaultdict(list))
    for number in range(num_rounds):
        for tree, found in zip(trees, values, strict=True):
            for key, value in run_probes(tree).items():
                found[key].append(value)
                print_progress(number, tree.name.upper(), f"{key} {value:.4g}")
    return values[0], values[1]


@contextlib.contextmanager
def _worktree(commit: str, path: Path) -> Iterator[Path]:
    _git("worktree", "add", "--quiet", "--detach", str(path), commit)
    try:
        yield path
    finally:
        _git("worktree", "remove", "--force", str(path))


def _git(*arguments: str) -> None:
    command = ["git", "-C", str(ROOT), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise TargetError(f"{' '.join(command)} failed: {done.stderr.strip()}")


def run_probes(tree: Path) -> dict[str, float]:
    """Run the probes on the code of a directory; a probe that its code cannot run is left out.

    Raises:
        TargetError: The probes' process failed, or took longer than ``TIMEOUT_S``.
    """
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tree), str(tree / "scripts")])}
    try:
        done = subprocess.run(
            [sys.executable, PROBES],
            env=environment,
            cwd=tree,
            stdout=subprocess.PIPE,
            text=True,
            timeout=TIMEOUT_S,
            check=True,
        )
    except subprocess.SubprocessError as error:
        raise TargetError(f"The probes of {tree} failed: {error}") from None
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def make_report(before: Values, after: Values, commits: tuple[str, str]) -> Report:
    """Return the ratio of B to A of each key that both have."""
    keys, rows = {}, []
    for name in before:
        if name not in after:
            continue
        a, b = Summary(tuple(before[name])), Summary(tuple(after[name]))
        ratio = keys[f"{name}_ratio"] = b.over(a)
        rows.append((name, a, b, ratio, _verdict(ratio)))
    missing = sorted(before.keys() ^ after.keys())
    columns = ("CPU time", f"A: {commits[0]}", f"B: {commits[1]}", "B / A", "")
    return Report(
        keys=keys,
        tables=[Table("CPU time; less is better", columns, rows)],
        notes=[f"Only one of the commits can run: {', '.join(missing)}."] if missing else [],
    )


def _verdict(ratio: Summary) -> str:
    if ratio.low > WORSE:
        return "slower"
    return "faster" if ratio.high < 1 / WORSE else "same"
