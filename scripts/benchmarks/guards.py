"""Time to first token with guards, compared with the same requests without.

One stream at a time (128 prompt and 4 completion tokens) in one cluster with a generator and
classifiers on the same cores. The API keys choose the guards: none; a classifier that judges the
prompt during its prefill, with default settings and with one thread; patterns that redact the
prompt and the answer.
"""

import argparse
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import count
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks import token_times
from benchmarks.endpoint import Endpoint
from benchmarks.engine.measure import PromptMaker
from benchmarks.engine.servers import prepare_model
from benchmarks.report import Report, Table, print_progress
from benchmarks.rounds import Summary, interleave, percentile
from benchmarks.targets.running import REAL_MODEL
from benchmarks.targets.tandem import tandem_with_pools
from benchmarks.token_times import StreamLoad
from cluster.admission.keys import KeyFileContents, digest, new_key
from cluster.key_file import write_keys

SECONDS, QUICK_SECONDS = 20.0, 3.0
WARM_UP_S = 5.0
COMPLETION_TOKENS = 4
PLAIN, PATTERNS = "plain", "patterns"
CLASSIFIERS: dict[str, dict[str, Any]] = {
    "classifier": {},
    "classifier-1-thread": {"threads": 1},
}
"""Settings of the classifier by variant."""
GUARDED = (*CLASSIFIERS, PATTERNS)
GOALS = {"classifier_added_ttft_p50_ms": "<= 5", "patterns_added_ttft_p50_ms": "<= 5"}
GENERATOR = {
    "name": REAL_MODEL,
    "model": "smollm2-135m-instruct",
    "max_model_len": 2048,
    "kv_cache_memory_bytes": "512MiB",
    "replicas": {"min": 1, "max": 1},
    "resources": {"cpus": 0.5},
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--seconds", type=float, default=SECONDS, help="duration of each load")
    parser.add_argument(
        "--guards", nargs="+", choices=GUARDED, default=list(GUARDED), help="guards to measure"
    )


def make_pools(guards: Sequence[str]) -> dict[str, Any]:
    """Return the pools and guards of the cluster; each measured classifier has its own pool."""
    classifiers = {name: CLASSIFIERS[name] for name in guards if name in CLASSIFIERS}
    return {
        "generators": [GENERATOR],
        "classifiers": [
            {
                "name": name,
                "model": "sentiment-minilm",
                # Every prompt is new; a result from the cache would cost less.
                "result_cache": {"max_bytes": 0},
                "replicas": {"min": 1, "max": 1},
                "resources": {"cpus": 0.25},
                **settings,
            }
            for name, settings in classifiers.items()
        ],
        "guards": [
            *(
                {
                    "name": name,
                    "classifier": name,
                    "labels": ["NEGATIVE"],
                    # Waits for the verdict as `block` does, and answers every prompt.
                    "action": "flag",
                    "checks": "prompt",
                    "timeout_s": 30,
                    "default": False,
                }
                for name in classifiers
            ),
            {
                "name": PATTERNS,
                "patterns": ["card", "iban", "email", "phone"],
                "action": "redact",
                "default": False,
            },
        ],
    }


def run(args: argparse.Namespace) -> Report:
    seconds = QUICK_SECONDS if args.quick else args.seconds
    prompts = PromptMaker.from_model(Path(prepare_model()))
    p50_ms: dict[str, list[float]] = defaultdict(list)
    variants = (PLAIN, *args.guards)
    with _cluster(variants) as endpoints:
        for variant, endpoint in endpoints.items():
            measure(endpoint, prompts, WARM_UP_S, "warm-up", variant)
        for number, variant in interleave(variants, args.rounds):
            found = measure(endpoints[variant], prompts, seconds, number, variant)
            p50_ms[variant].append(found)
            print_progress(number, variant, f"TTFT p50 {found:.1f} ms")
    return make_report(p50_ms)


@contextmanager
def _cluster(variants: Sequence[str]) -> Iterator[dict[str, Endpoint]]:
    """Run the cluster; yield its endpoint with the key of each variant."""
    keys = {variant: new_key() for variant in variants}
    entries = [
        {
            "sha256": digest(key),
            "tenant": variant,
            "guards": [] if variant == PLAIN else [variant],
        }
        for variant, key in keys.items()
    ]
    with TemporaryDirectory() as directory:
        file = Path(directory) / "keys.yaml"
        write_keys(file, KeyFileContents.model_validate({"keys": entries}))
        with tandem_with_pools(
            make_pools(variants), REAL_MODEL, {"keys_file": str(file)}
        ) as running:
            yield {
                variant: replace(running.endpoint, headers={"authorization": f"Bearer {key}"})
                for variant, key in keys.items()
            }


def measure(endpoint: Endpoint, prompts: PromptMaker, seconds: float, *seed: int | str) -> float:
    """Return the median time to first token in milliseconds."""
    bodies = (
        {
            "model": endpoint.model,
            "prompt": prompts.make_prompts(1, number, *seed)[0],
            "max_tokens": COMPLETION_TOKENS,
            "ignore_eos": True,
            "temperature": 0,
            "stream": True,
        }
        for number in count()
    )
    requests = (endpoint.encode_request("/v1/completions", body) for body in bodies)
    times = token_times.measure(endpoint, StreamLoad(requests, 1, 0, 0, seconds))
    return percentile(times.ttft_s, 50) * 1e3


def make_report(p50_ms: dict[str, list[float]]) -> Report:
    """Return the difference to the requests without guards in each round."""
    summaries = {variant: Summary(tuple(found)) for variant, found in p50_ms.items()}
    added = {
        variant: summary.minus(summaries[PLAIN])
        for variant, summary in summaries.items()
        if variant != PLAIN
    }
    keys = {
        f"{variant.replace('-', '_')}_added_ttft_p50_ms": each for variant, each in added.items()
    }
    return Report(
        keys=keys,
        goals={key: goal for key, goal in GOALS.items() if key in keys},
        tables=[
            Table(
                "Time to first token in milliseconds, median",
                ("guards", "TTFT", "added"),
                [(variant, summaries[variant], added.get(variant)) for variant in summaries],
            )
        ],
        details={f"{variant}_ttft_p50_ms": each for variant, each in summaries.items()},
        notes=[
            "One stream at a time; each prompt is new. The classifier judges the prompt while the "
            "generator computes its prefill; patterns also rewrite every event of the answer."
        ],
    )
