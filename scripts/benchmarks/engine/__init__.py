"""SmolLM2 on vLLM: Tandem, vLLM's own server and Ray Serve LLM, each with its defaults.

Requests of 128 prompt tokens and 64 completion tokens, streamed, 1, 8 and 32 at a time. Each server
runs alone on the machine and is restarted in every round, so its start-up time is measured as often
as the rest. A round takes minutes. ``--append FILE`` adds rounds to those of earlier runs, which
may have measured only some of the servers.
"""

import argparse
from pathlib import Path

from benchmarks.engine import measure, report
from benchmarks.engine.servers import TARGETS, prepare_model
from benchmarks.report import Report, print_progress
from benchmarks.rounds import interleave


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--targets", nargs="+", choices=list(TARGETS), default=list(TARGETS), help="servers"
    )
    parser.add_argument(
        "--concurrent", nargs="+", type=int, default=[1, 8, 32], help="concurrent requests"
    )
    parser.add_argument(
        "--append", type=Path, metavar="FILE", help="file of all rounds; new rounds are added"
    )


def run(args: argparse.Namespace) -> Report:
    model = prepare_model()
    prompts = measure.PromptMaker.from_model(Path(model))
    rounds = report.load_rounds(args.append)
    num_earlier = min(len(rounds.get(name, [])) for name in args.targets)
    order = list(interleave(args.targets, num_earlier + args.rounds))
    for number, name in order[num_earlier * len(args.targets) :]:
        with TARGETS[name](model) as ready:
            print_progress(number, name, f"ready after {ready.ready_s:.1f} s")
            endpoint = ready.running.endpoint
            settings = [measure.Setting(number, num, args.quick) for num in args.concurrent]
            results = [measure.measure(endpoint, prompts, setting) for setting in settings]
        rounds.setdefault(name, []).append(report.EngineRound(ready.ready_s, tuple(results)))
        report.save_rounds(args.append, rounds)
        last = results[-1]
        print_progress(number, name, f"{last.tokens_s:.0f} tokens/s at {last.concurrent}")
    return report.make_report(rounds)
