"""One GPU: the classifier's share of its matmul rate, and vLLM through Tandem and alone.

Three parts on one card, one after the other: its rate of bfloat16 products of large matrices,
measured; the default classifier's operations per second, as a share of it; and TTFT, ITL and
throughput of a language model through Tandem and through `vllm serve`, with the same KV cache. The
servers are started again in each round, and rounds go on while another one fits into ``--minutes``
(``--rounds`` has no effect). A part that fails is reported and does not stop the others.
"""

import argparse
import time
from collections.abc import Callable

from benchmarks.endpoint import TargetError
from benchmarks.gpu import encoder, servers
from benchmarks.report import Report, print_progress

PARTS = ("encoder", "servers")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--part", choices=PARTS, nargs="+", default=list(PARTS), help="parts")
    parser.add_argument("--minutes", type=float, default=10.0, help="end after about this time")
    parser.add_argument("--model", help="directory of a language model (default: SmolLM2)")
    parser.add_argument("--classifier", default="sentiment-minilm", help="model of the classifier")
    parser.add_argument("--kv-gib", type=int, default=4, help="KV cache of each server in GiB")
    parser.add_argument(
        "--concurrent", nargs="+", type=int, default=[1, 8, 32, 128], help="concurrent streams"
    )
    parser.add_argument("--seconds", type=float, default=8.0, help="duration of each measurement")


def run(args: argparse.Namespace) -> Report:
    """Run the parts, and return what could be measured.

    Raises:
        TargetError: There is no GPU.
    """
    deadline = time.monotonic() + 60 * args.minutes
    if args.quick:
        args.concurrent, args.seconds = args.concurrent[:1], min(args.seconds, 2.0)
    encoder.require_gpu()
    runs: dict[str, Callable[[], Report]] = {
        "encoder": lambda: encoder.run(args.classifier, quick=args.quick),
        "servers": lambda: servers.run(args, deadline),
    }
    report = Report({})
    for part in args.part:
        try:
            report = report.joined(runs[part]())
        except Exception as error:  # the device time of the other parts must not be lost
            text = str(error) if isinstance(error, TargetError) else repr(error)
            print_progress(0, part, f"failed: {text}")
            report = report.joined(Report({}, notes=[f"{part} failed: {text}"]))
    return report
