"""Measure Tandem and its peers; print tables and optionally write JSON."""

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

from benchmarks import (
    autoscale,
    batches,
    classify,
    engine,
    gpu,
    guards,
    handle,
    knowledge,
    link,
    memory,
    metrics,
    mixed,
    overload,
    page,
    regress,
    routing,
    scale,
    start,
    stream,
)
from benchmarks.report import Report, print_report, write_json
from cluster.errors import TandemError
from cluster.launch.processes import interrupt_on_termination

DEFAULT_ROUNDS = 3
REPORT = "report"


class Benchmark(Protocol):
    """Interface of a benchmark's module; see the package's docstring."""

    def add_arguments(self, parser: argparse.ArgumentParser, /) -> None: ...

    def run(self, args: argparse.Namespace, /) -> Report: ...


BENCHMARKS: Mapping[str, Benchmark] = {
    "stream": stream,
    "engine": engine,
    "gpu": gpu,
    "handle": handle,
    "classify": classify,
    "memory": memory,
    "link": link,
    "metrics": metrics,
    "routing": routing,
    "scale": scale,
    "overload": overload,
    "mixed": mixed,
    "guards": guards,
    "knowledge": knowledge,
    "batches": batches,
    "autoscale": autoscale,
    "regress": regress,
    "start": start,
}


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="bench", description=__doc__)
    commands = parser.add_subparsers(dest="benchmark", required=True)
    for name, benchmark in BENCHMARKS.items():
        summary, _, rest = (benchmark.__doc__ or "").partition("\n")
        command = commands.add_parser(
            name,
            help=summary,
            description=f"{summary}\n{rest}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        command.add_argument(
            "--rounds", type=_positive, help="number of rounds (default: 3, with --quick 1)"
        )
        command.add_argument(
            "--quick", action="store_true", help="short run that shows that the benchmark works"
        )
        command.add_argument("--json", type=Path, metavar="FILE", help="write the results to FILE")
        benchmark.add_arguments(command)
    commands.add_parser(
        REPORT, help="Write the table at the top of docs/performance.md from committed results"
    )
    return parser


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return number


def main() -> int:
    """Run one benchmark; all processes that it started have ended on return."""
    args = make_parser().parse_args()
    if args.benchmark == REPORT:
        page.write_page()
        return 0
    args.rounds = args.rounds or (1 if args.quick else DEFAULT_ROUNDS)
    interrupt_on_termination()
    try:
        report = BENCHMARKS[args.benchmark].run(args)
    except TandemError as error:
        print(f"bench {args.benchmark}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"bench {args.benchmark}: interrupted", file=sys.stderr)
        return 130
    print_report(report)
    if args.json is not None:
        write_json(args.json, args, report)
    return 0


if __name__ == "__main__":
    sys.exit(main())
