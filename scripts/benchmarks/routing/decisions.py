"""Part 1 of ``bench routing``: microseconds per decision."""

import argparse
import gc
import json
import random
import time
from collections import defaultdict
from typing import get_args

import numpy as np

from benchmarks.report import Report, Table, print_progress
from benchmarks.rounds import Summary, interleave
from cluster.config import RoutingPolicy
from cluster.routing import Fleet, Placement, PrefixIndex, RequestView, fingerprint, make_policy
from cluster.routing.request import TOKENS_PER_BYTE_PRIOR

POLICIES: tuple[RoutingPolicy, ...] = get_args(RoutingPolicy)
GOAL = "<= 50"
HEADLINE = "decision_us_p99"
"""Key of ``DEFAULT_POLICY``."""
DEFAULT_POLICY = "prefix"
FULL, FULL_KEY = "prefix, full", "decision_full_us_p99"
"""Name and key of a decision with the prompt's fingerprint and the bookkeeping."""
MAX_BLOCKS = 64
"""Blocks in the longest prompt."""
BLOCK_TOKENS = 128.0
NUM_FAMILIES = 2000
"""Groups of prompts with a common prefix; some are frequent, most are rare."""
NUM_COMMON = 64
"""Families whose prefix is in every cache at the start."""
REQUESTS_PER_REPLICA = 16
"""Requests in flight per replica."""


class LoadedFleet:
    """Busy fleet with a full prefix index, made from a seed."""

    def __init__(self, replicas: int, blocks: int, seed: int = 0) -> None:
        self._random = random.Random(seed)
        self.fleet, self.index = Fleet(), PrefixIndex(max_entries=blocks)
        self._now_s = 0.0
        self._names = [f"generator#{number:04d}" for number in range(replicas)]
        for name in self._names:
            self.fleet.add(name, 512)
        self._open: list[Placement] = []
        self._fill(blocks)
        for _ in range(REQUESTS_PER_REPLICA * replicas):
            self.place_request(self._random.choice(self._names), self.make_request())

    def _fill(self, blocks: int) -> None:
        """Store prompts until the index is full; common prefixes are stored at every replica."""
        for family in range(NUM_COMMON):
            common = self._family_prefix(family)
            for name in self._names:
                self.index.add_stored(name, common)
        while self.index.num_entries < 0.98 * blocks:
            for _ in range(200):
                name = self._random.choice(self._names)
                self.index.add_stored(name, self.make_request().prefix)

    def _family_prefix(self, family: int) -> tuple[int, ...]:
        rng = random.Random(family)
        return tuple(rng.getrandbits(64) for _ in range(rng.randint(4, MAX_BLOCKS // 2)))

    def make_request(self) -> RequestView:
        """Return a prompt with a family's prefix and a less common continuation."""
        rng = self._random
        prefix = self._family_prefix(int(NUM_FAMILIES * rng.random() ** 3))
        tail = random.Random(hash((prefix[0], rng.randint(0, 400))))
        more = tuple(tail.getrandbits(64) for _ in range(MAX_BLOCKS - len(prefix)))
        prefix = (prefix + more)[: rng.randint(len(prefix), MAX_BLOCKS)]
        ends = tuple(BLOCK_TOKENS * (index + 1) for index in range(len(prefix)))
        session = str(rng.randint(0, 5000))
        return RequestView(ends[-1] + 50.0, 200.0, prefix, ends, session, streamed=True)

    def place_request(self, name: str, request: RequestView) -> None:
        """Place a request as a router does, then let one request progress and one end."""
        self.advance()
        self.book(name, request)
        self.progress()

    def advance(self) -> None:
        """Advance the time by a millisecond."""
        self._now_s += 0.001
        self.fleet.advance(self._now_s)
        self.index.advance(self._now_s)

    def book(self, name: str, request: RequestView) -> None:
        """Record a request at the chosen replica."""
        held = self.index.count(name, request.prefix)
        cached = request.prefix_tokens[held - 1] if held else 0.0
        self._open.append(self.fleet.place(name, request, cached))
        self.index.expect(name, request.prefix, held)

    def progress(self) -> None:
        """Let one request get its first token, and one end if there are many."""
        self.fleet.record_first_token(self._random.choice(self._open))
        if len(self._open) > REQUESTS_PER_REPLICA * len(self._names):
            ended = self._random.randrange(len(self._open))
            self._open[ended], self._open[-1] = self._open[-1], self._open[ended]
            self.fleet.end(self._open.pop())


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--replicas", type=int, default=256, help="number of replicas")
    parser.add_argument("--blocks", type=int, default=2**20, help="blocks in the prefix index")
    parser.add_argument(
        "--decisions", type=int, default=20_000, help="decisions per policy and round"
    )


def run(args: argparse.Namespace) -> Report:
    """Time every policy's decisions on one fleet, in every round."""
    if args.quick:
        args.decisions = min(args.decisions, 2000)
    loaded = LoadedFleet(args.replicas, args.blocks)
    times: dict[str, list[np.ndarray]] = defaultdict(list)
    for number, name in interleave(POLICIES, args.rounds):
        timings_us = time_decisions(loaded, name, args.decisions)
        times[name].append(timings_us)
        p50, p99 = np.percentile(timings_us, (50, 99))
        print_progress(number, name, f"p50 {p50:.1f} µs, p99 {p99:.1f} µs")
        if name == DEFAULT_POLICY:
            times[FULL].append(time_full_decisions(loaded, args.decisions))
    return _report(times, args, loaded)


def time_decisions(loaded: LoadedFleet, name: str, decisions: int) -> "np.ndarray":
    """Return the CPU microseconds of each decision; other processes do not count."""
    policy, clock = make_policy(name, loaded.index), time.thread_time_ns
    timings_us = np.zeros(decisions)
    gc.collect()
    gc.freeze()  # as Serve does after a router has started
    for number in range(decisions):
        request = loaded.make_request()
        began = clock()
        chosen = policy.choose(request, loaded.fleet)
        timings_us[number] = (clock() - began) / 1000
        assert chosen is not None
        loaded.place_request(chosen, request)
    return timings_us


def time_full_decisions(loaded: LoadedFleet, decisions: int) -> "np.ndarray":
    """Return the CPU microseconds of fingerprint, choice and bookkeeping of each decision."""
    policy, clock = make_policy(DEFAULT_POLICY, loaded.index), time.thread_time_ns
    text = random.Random(0).randbytes(int(2 * MAX_BLOCKS * BLOCK_TOKENS) + decisions).hex()
    timings_us = np.zeros(decisions)
    gc.collect()
    gc.freeze()
    for number in range(decisions):
        request = loaded.make_request()
        # The benchmark's hashes belong to no text, so a text of the same length is hashed.
        num_bytes = int(request.prefix_tokens[-1] / TOKENS_PER_BYTE_PRIOR)
        prompt = text[number : number + num_bytes]
        body = json.dumps({"model": "m", "prompt": prompt, "stream": True}).encode()
        began = clock()
        fingerprint("/v1/completions", body)
        loaded.advance()
        chosen = policy.choose(request, loaded.fleet)
        assert chosen is not None
        loaded.book(chosen, request)
        timings_us[number] = (clock() - began) / 1000
        loaded.progress()
    return timings_us


def _report(
    times: dict[str, list["np.ndarray"]], args: argparse.Namespace, loaded: LoadedFleet
) -> Report:
    keys: dict[str, Summary] = {}
    rows = []
    for name, rounds in times.items():
        at = {p: Summary(tuple(float(np.percentile(r, p)) for r in rounds)) for p in (50, 99)}
        keys |= {f"decision_us_p{p}_{name}": summary for p, summary in at.items()}
        rows.append((name, at[50], at[99]))
    keys[FULL_KEY] = keys.pop(f"decision_us_p99_{FULL}")
    keys[HEADLINE] = keys[f"decision_us_p99_{DEFAULT_POLICY}"]
    num_blocks = loaded.index.num_entries
    title = f"CPU µs per decision, {args.replicas} replicas, {num_blocks:,} blocks"
    return Report(
        keys=keys,
        goals={HEADLINE: GOAL, FULL_KEY: GOAL},
        tables=[Table(title, ("policy", "p50", "p99"), rows)],
        notes=[f"{args.decisions:,} consecutive decisions per policy and round."],
    )
