"""SmolLM2 on vLLM: the cluster beside vLLM's own server and Ray Serve's, each with its defaults.

Requests of 128 prompt tokens and 64 completion tokens, streamed, 1, 8 and 32 at a time. Each
server runs alone on the machine and is started anew in every round, so its time until it is ready
is measured as often as the rest. A round takes minutes; ``--append FILE`` adds rounds to those of
earlier runs, which may also have had some of the servers alone.
"""

import argparse
from pathlib import Path

from benchmarks.engine import cells, result
from benchmarks.engine.paths import TARGETS, prepare
from benchmarks.engine.prompts import Prompts
from benchmarks.report import Report
from benchmarks.rounds import interleaved
from benchmarks.stream.paths import say


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``bench engine``."""
    parser.add_argument("--targets", nargs="+", choices=list(TARGETS), default=list(TARGETS))
    parser.add_argument("--concurrent", nargs="+", type=int, default=[1, 8, 32])
    parser.add_argument(
        "--append", type=Path, metavar="FILE", help="keep every round there, and add to its rounds"
    )


def run(args: argparse.Namespace) -> Report:
    """Measure every server in every round."""
    model = prepare()
    prompts = Prompts.of(Path(model))
    found = result.load(args.append)
    begun = min(len(found.get(name, [])) for name in args.targets)
    order = list(interleaved(args.targets, begun + args.rounds))[begun * len(args.targets) :]
    for number, name in order:
        with TARGETS[name](model) as ready:
            say(number, name, f"ready after {ready.ready_s:.1f} s")
            measured = [
                cells.measure(
                    ready.running.endpoint, prompts, cells.Wanted(number, num, args.quick)
                )
                for num in args.concurrent
            ]
        found.setdefault(name, []).append(result.Round(ready.ready_s, tuple(measured)))
        result.save(args.append, found)
        say(number, name, f"{measured[-1].tokens_s:.0f} tokens/s at {measured[-1].concurrent}")
    return result.report(found)
