"""SmolLM2 on vLLM: the default cluster, its engine alone, and each peer as documented and tuned.

Requests of 128 prompt tokens and 64 completion tokens, streamed, 1, 8 and 32 at a time. Each server
runs alone on the machine and is restarted in every round, so its start-up time is measured as often
as the rest. Before the measurement, each one gets the highest load for a minute, so that the
autoscaler has acted. A round takes minutes. ``--append FILE`` adds rounds to those of earlier runs,
which may have measured only some of the servers.
"""

import argparse
from pathlib import Path

from benchmarks.endpoint import TargetError
from benchmarks.engine import measure, report
from benchmarks.engine.servers import (
    CLUSTER,
    DEFAULT_TARGETS,
    QUICK_TARGETS,
    TARGETS,
    prepare_model,
)
from benchmarks.report import Report, print_progress
from benchmarks.rounds import interleave


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--targets",
        nargs="+",
        choices=list(TARGETS),
        help=f"servers (default: {' '.join(DEFAULT_TARGETS)}; "
        f"with --quick {' '.join(QUICK_TARGETS)})",
    )
    parser.add_argument(
        "--concurrent", nargs="+", type=int, default=[1, 8, 32], help="concurrent requests"
    )
    parser.add_argument(
        "--append", type=Path, metavar="FILE", help="file of all rounds; new rounds are added"
    )


def run(args: argparse.Namespace) -> Report:
    args.targets = args.targets or list(QUICK_TARGETS if args.quick else DEFAULT_TARGETS)
    model = prepare_model()
    prompts = measure.PromptMaker.from_model(Path(model))
    rounds = report.load_rounds(args.append)
    num_earlier = min(len(rounds.get(name, [])) for name in args.targets)
    order = list(interleave(args.targets, num_earlier + args.rounds))
    failures: dict[str, str] = {}
    for number, name in order[num_earlier * len(args.targets) :]:
        if name in failures:
            continue
        try:
            measured = _measure(name, model, prompts, number, args)
        except TargetError as error:
            if name == CLUSTER:
                raise
            # A peer that does not run must not cost the results of the others.
            failures[name] = str(error)
            print_progress(number, name, f"left out: {error}")
            continue
        rounds.setdefault(name, []).append(measured)
        report.save_rounds(args.append, rounds)
        last = measured.cells[-1]
        print_progress(number, name, f"{last.tokens_s:.0f} tokens/s at {last.concurrent}")
        for event in measured.scale_events:
            print_progress(number, name, event)
    return report.make_report(rounds, failures)


def _measure(
    name: str, model: str, prompts: measure.PromptMaker, number: int, args: argparse.Namespace
) -> report.EngineRound:
    warm_up_s = measure.QUICK_WARM_UP_S if args.quick else measure.WARM_UP_S
    with TARGETS[name](model) as server:
        print_progress(number, name, f"ready after {server.ready_s:.1f} s: {server.command}")
        measure.warm_up(server.sender, prompts, number, max(args.concurrent), warm_up_s)
        settings = [measure.Setting(number, num, args.quick) for num in args.concurrent]
        cells = tuple(measure.measure(server.sender, prompts, setting) for setting in settings)
        events = server.read_scale_events()
    return report.EngineRound(server.ready_s, cells, server.command, tuple(events))
