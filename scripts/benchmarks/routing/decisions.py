"""Part 1 of ``bench routing``: microseconds a decision."""

import argparse
import gc
import random
import time
from collections import defaultdict
from typing import get_args

import numpy as np

from benchmarks.report import Report, Table
from benchmarks.rounds import Summary, interleaved
from benchmarks.stream.paths import say
from cluster.config import RoutingPolicy
from cluster.routing import Fleet, Placement, PrefixIndex, RequestView, make_policy

POLICIES: tuple[RoutingPolicy, ...] = get_args(RoutingPolicy)
GOAL = "<= 50"
HEADLINE = "decision_us_p99"
"""Of the policy that generators have where nothing is said, ``prefix``."""
PREFIXES = 64
"""Boundaries in the longest prompt."""
TOKENS_EACH = 128.0
"""Prompt tokens between two boundaries."""
FAMILIES = 2000
"""Groups of prompts that share a beginning; some are common, most are rare."""


class World:
    """A fleet at work and an index that is full, made from a seed."""

    def __init__(self, replicas: int, blocks: int, seed: int = 0) -> None:
        self._random = random.Random(seed)
        self.fleet, self.index = Fleet(), PrefixIndex(max_entries=blocks)
        self._now_s = 0.0
        self._names = [f"generator#{number:04d}" for number in range(replicas)]
        for name in self._names:
            self.fleet.add(name, 512)
        self._open: list[Placement] = []
        self._fill(blocks)
        for _ in range(16 * replicas):
            self.place(self._random.choice(self._names), self.request())

    def _fill(self, blocks: int) -> None:
        """Store prompts until the index is full; the beginnings of common ones are everywhere."""
        for family in range(64):
            common = self._beginning(family)
            for name in self._names:
                self.index.add_stored(name, common)
        while self.index.num_entries < 0.98 * blocks:
            for _ in range(200):
                name = self._random.choice(self._names)
                self.index.add_stored(name, self.request().prefix)

    def _beginning(self, family: int) -> tuple[int, ...]:
        drawn = random.Random(family)
        return tuple(drawn.getrandbits(64) for _ in range(drawn.randint(4, PREFIXES // 2)))

    def request(self) -> RequestView:
        """A prompt that begins as others do and goes on as some do."""
        drawn = self._random
        prefix = self._beginning(int(FAMILIES * drawn.random() ** 3))
        tail = random.Random(hash((prefix[0], drawn.randint(0, 400))))
        more = tuple(tail.getrandbits(64) for _ in range(PREFIXES - len(prefix)))
        prefix = (prefix + more)[: drawn.randint(len(prefix), PREFIXES)]
        ends = tuple(TOKENS_EACH * (index + 1) for index in range(len(prefix)))
        session = str(drawn.randint(0, 5000))
        return RequestView(ends[-1] + 50.0, 200.0, prefix, ends, session, streamed=True)

    def place(self, name: str, request: RequestView) -> None:
        """What a router does once it has chosen, and what happens until the next request."""
        self._now_s += 0.001
        self.fleet.advance(self._now_s)
        self.index.advance(self._now_s)
        held = self.index.count(name, request.prefix)
        cached = request.prefix_tokens[held - 1] if held else 0.0
        self._open.append(self.fleet.place(name, request, cached))
        self.index.expect(name, request.prefix)
        self.fleet.record_first_token(self._random.choice(self._open))
        if len(self._open) > 16 * len(self._names):
            ended = self._random.randrange(len(self._open))
            self._open[ended], self._open[-1] = self._open[-1], self._open[ended]
            self.fleet.end(self._open.pop())


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of this part."""
    parser.add_argument("--replicas", type=int, default=256)
    parser.add_argument("--blocks", type=int, default=2**20, help="in the index of prefixes")
    parser.add_argument("--decisions", type=int, default=20_000, help="of each policy in a round")


def run(args: argparse.Namespace) -> Report:
    """Time every policy's decisions in one world, in every round."""
    if args.quick:
        args.decisions = min(args.decisions, 2000)
    world = World(args.replicas, args.blocks)
    times: dict[str, list[np.ndarray]] = defaultdict(list)
    for number, name in interleaved(POLICIES, args.rounds):
        found = _decide(world, name, args.decisions)
        times[name].append(found)
        say(number, name, f"{np.percentile(found, 50):.1f} us, p99 {np.percentile(found, 99):.1f}")
    return _report(times, args, world)


def _decide(world: World, name: str, decisions: int) -> "np.ndarray":
    """Microseconds of CPU of each decision; what else runs on the core has no part in it."""
    policy, clock = make_policy(name, world.index), time.thread_time_ns
    taken = np.zeros(decisions)
    gc.collect()
    gc.freeze()  # as Serve does when a router has started
    for number in range(decisions):
        request = world.request()
        begun = clock()
        chosen = policy.choose(request, world.fleet)
        taken[number] = (clock() - begun) / 1000
        assert chosen is not None
        world.place(chosen, request)
    return taken


def _report(times: dict[str, list["np.ndarray"]], args: argparse.Namespace, world: World) -> Report:
    keys: dict[str, Summary] = {}
    rows = []
    for name, rounds in times.items():
        at = {p: Summary(tuple(float(np.percentile(r, p)) for r in rounds)) for p in (50, 99)}
        keys |= {f"decision_us_p{p}_{name}": summary for p, summary in at.items()}
        rows.append((name, at[50], at[99]))
    keys[HEADLINE] = keys[f"decision_us_p99_{'prefix'}"]
    title = f"A decision in µs, {args.replicas} replicas, {world.index.num_entries:,} blocks"
    return Report(
        keys=keys,
        goals={HEADLINE: GOAL},
        tables=[Table(title, ("policy", "p50", "p99"), rows)],
        notes=[f"{args.decisions:,} decisions of each policy in a round, one after the other"],
    )
