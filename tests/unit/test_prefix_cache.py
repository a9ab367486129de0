"""What routers believe of an engine is what its KV blocks hold, however requests come and go."""

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.config import SimConfig
from cluster.engines import prefix_cache
from cluster.engines.prefix_cache import PrefixTracker, byte_lengths_of
from cluster.engines.sim import tokenizer
from cluster.engines.sim.blocks import block_hashes
from cluster.engines.sim.scheduler import Request, Scheduler
from cluster.link import PrefixEvents
from cluster.routing import Fingerprint

BLOCK = 4
PREFIX_BYTES = 20


def text_of(text: str) -> Fingerprint:
    """A prefix after each few bytes, so that small prompts have many."""
    ends = tuple(range(PREFIX_BYTES, len(text) + 1, PREFIX_BYTES))
    return Fingerprint(tuple(hash(text[:end]) & (2**64 - 1) for end in ends), ends, len(text))


def tracker(**knobs: int) -> PrefixTracker:
    return PrefixTracker(BLOCK, tokenizer.byte_lengths, **knobs)


class Router:
    """Believes what it is told."""

    def __init__(self) -> None:
        self.held: set[int] = set()

    def take(self, events: PrefixEvents | None) -> None:
        if events is not None:
            self.held = set() if events.cleared else self.held
            self.held -= set(events.removed)
            self.held |= set(events.stored)


class Fleet:
    """One simulated engine and what two routers know of it; the second one comes late."""

    def __init__(self, num_blocks: int) -> None:
        self.tracker = tracker()
        config = SimConfig(num_kv_blocks=num_blocks, block_size_tokens=BLOCK, max_num_seqs=3)
        self.scheduler = Scheduler(config, lambda: 0.0, self.tracker)
        self.routers = [Router()]
        self.asked: dict[int, set[int]] = {}  # the block that each prefix rests on

    def ask(self, text: str, max_tokens: int) -> Request | None:
        ids = tokenizer.encode(text)
        if not ids or len(ids) + max_tokens > self.scheduler.max_request_tokens:
            return None
        request = Request(list(ids), max_tokens, lambda: 7)
        self.scheduler.add(request)
        print_ = text_of(text)
        self.tracker.asked(print_, ids)
        blocks = block_hashes(ids, BLOCK)
        for prefix, end in zip(print_.hashes, print_.ends, strict=True):
            count = max(1, len(tokenizer.encode(text[:end])) // BLOCK)
            if blocks:
                self.asked.setdefault(prefix, set()).add(blocks[min(count, len(blocks)) - 1])
        return request

    def step(self) -> None:
        step = self.scheduler.plan()
        if step is not None:
            self.scheduler.commit(step)

    def tell(self) -> None:
        events = self.tracker.take_events()
        for router in self.routers:
            router.take(events)

    def join(self) -> None:
        router = Router()
        router.take(PrefixEvents(stored=self.tracker.snapshot(), cleared=True))
        self.routers.append(router)

    def truth(self) -> set[int]:
        pool = self.scheduler.blocks
        return {
            prefix
            for prefix, blocks in self.asked.items()
            if any(pool.match([block]) for block in blocks)
        }


# Whole tokens of four bytes, so that no prefix ends within one.
pieces = st.sampled_from([" one", " two", " six", " ten", " abc"])
beginnings = st.sampled_from([" sys" * 30, " Sys" * 12, " SYS" * 25, " syS" * 20])
prompts = st.builds(lambda start, rest: start + "".join(rest), beginnings, st.lists(pieces))
moves = st.one_of(
    st.tuples(st.just("ask"), prompts, st.integers(1, 6)),
    st.tuples(st.just("ask"), prompts, st.integers(1, 6)),
    st.tuples(st.just("step"), st.integers(1, 30)),
    st.tuples(st.sampled_from(["tell", "join", "abort"])),
)


@settings(max_examples=300)
@given(st.integers(12, 60), st.lists(moves, min_size=12, max_size=60))
def test_routers_believe_what_the_engine_holds(num_blocks: int, moves: Sequence[tuple]) -> None:  # type: ignore[type-arg]
    fleet = Fleet(num_blocks)
    requests: list[Request] = []
    for name, *arguments in moves:
        if name == "ask" and (request := fleet.ask(*arguments)) is not None:
            requests.append(request)
        elif name == "step":
            for _ in range(arguments[0]):
                fleet.step()
        elif name == "abort" and requests:
            fleet.scheduler.abort(requests.pop())
        elif name in ("tell", "join"):
            getattr(fleet, name)()
    fleet.tell()
    for router in fleet.routers:
        assert router.held == fleet.truth()


def test_a_prefix_is_held_as_soon_as_its_last_whole_block_is() -> None:
    it = tracker()
    ids = list(range(0x20202020, 0x20202020 + 12))
    text = Fingerprint((1, 2, 3), (14, 35, 48), 48)  # 3.5, 8.75 and 12 tokens
    it.asked(text, ids)
    assert it.take_events() is None
    it.stored(["a"], None, ids[:4])
    assert it.take_events() == PrefixEvents(stored=[1], removed=[])
    it.stored(["b", "c"], "a", ids[4:])
    assert it.take_events() == PrefixEvents(stored=[3, 2], removed=[])
    it.removed(["c"])
    assert it.take_events() == PrefixEvents(stored=[], removed=[3])
    it.removed(["b", "a"])
    assert it.take_events() == PrefixEvents(stored=[], removed=[2, 1])
    assert it.snapshot() == []


def test_a_request_that_comes_after_its_blocks_is_seen() -> None:
    it = tracker()
    ids = list(range(0x20202020, 0x20202020 + 8))
    it.stored(["a", "b"], None, ids)
    it.asked(Fingerprint((1, 2), (16, 32), 32), ids)
    assert set(it.snapshot()) == {1, 2}


def test_a_prefix_of_two_prompts_is_held_while_one_of_its_blocks_is() -> None:
    it = tracker()
    for name, start in (("a", 0), ("b", 50)):  # the same text, of which other tokens were made
        ids = list(range(0x20202020 + start, 0x20202020 + start + 4))
        it.asked(Fingerprint((1,), (16,), 16), ids)
        it.stored([name], None, ids)
    it.removed(["a"])
    assert it.snapshot() == [1]
    it.removed(["b"])
    assert it.snapshot() == []


def test_a_block_that_is_cached_twice_is_gone_when_both_are() -> None:
    it = tracker()
    ids = [0x20202020] * 4
    it.asked(Fingerprint((1,), (16,), 16), ids)
    for _ in range(3):
        it.stored(["a"], None, ids)
    for _ in range(2):
        it.removed(["a"])
        assert it.snapshot() == [1]
    it.removed(["a"])
    assert it.snapshot() == []


def test_adapters_have_blocks_of_their_own() -> None:
    it = tracker()
    ids = [0x20202020] * 4
    it.asked(Fingerprint((1,), (16,), 16), ids, "lora")
    it.stored(["a"], None, ids)
    assert it.snapshot() == []
    it.stored(["b"], None, ids, "lora")
    assert it.snapshot() == [1]


def test_blocks_after_an_unknown_one_and_odd_ones_are_passed_over() -> None:
    it = tracker()
    ids = [0x20202020] * 8
    it.asked(Fingerprint((1, 2), (16, 32), 32), ids)
    it.stored(["b"], "lost", ids[4:])
    it.stored(["a"], None, ids[:3])
    it.removed(["never"])
    assert it.snapshot() == []


def test_cleared_begins_anew() -> None:
    it = tracker()
    ids = [0x20202020] * 4
    for _ in range(2):
        it.asked(Fingerprint((1,), (16,), 16), ids)
        it.stored(["a"], None, ids)
        assert it.snapshot() == [1]
        it.cleared()
        assert it.take_events() == PrefixEvents(stored=[], cleared=True)
        assert it.take_events() is None


def test_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefix_cache, "MAX_AWAITED", 10)
    monkeypatch.setattr(prefix_cache, "MAX_NEWS", 15)
    it = tracker(max_prefixes=20)
    router = Router()
    for number in range(100):
        ids = [0x20202020 + number] * 4
        it.asked(Fingerprint((number,), (16,), 16), ids)
        it.asked(Fingerprint((1000 + number,), (16,), 16), [number + 300] * 4)  # never stored
        it.stored([number], None, ids)
        it.asked(Fingerprint((number,), (16,), 16), ids)
    assert list(it.snapshot()) == list(range(80, 100))
    assert len(it._awaited) <= 10
    assert len(it._resting) <= 110
    events = it.take_events()
    assert events is not None
    assert events.cleared  # more changed than is told one by one
    router.take(events)
    assert router.held == set(it.snapshot())


def test_for_want_of_room_the_ends_of_prompts_go_before_their_beginnings() -> None:
    ids = list(range(0x20202020, 0x20202020 + 12))
    text = Fingerprint((1, 2, 3), (16, 32, 48), 48)
    for blocks_first in (False, True):
        it = tracker(max_prefixes=2)
        if not blocks_first:
            it.asked(text, ids)
        it.stored(["a", "b", "c"], None, ids)
        it.asked(text, ids)
        assert set(it.snapshot()) == {1, 2}


def test_news_are_called_once_until_they_are_taken() -> None:
    it, calls = tracker(), []
    it.on_change = lambda: calls.append(1)
    ids = list(range(0x20202020, 0x20202020 + 8))
    it.asked(Fingerprint((1, 2), (16, 32), 32), ids)
    it.stored(["a", "b"], None, ids)
    assert len(calls) == 1
    it.take_events()
    it.cleared()
    assert len(calls) == 2


@given(st.text(max_size=50))
def test_the_simulated_tokenizer_knows_the_length_of_its_tokens(text: str) -> None:
    ids = tokenizer.encode(text)
    lengths = tokenizer.byte_lengths(np.array(ids, np.uint32))
    assert lengths.tolist() == [len(tokenizer.piece_of(token).encode()) for token in ids]


def test_special_tokens_have_no_length() -> None:
    ids = tokenizer.encode_chat([("user", "Hi")], True)
    lengths = tokenizer.byte_lengths(np.array(ids, np.uint32))
    assert lengths.sum() == len("user\nHi\nassistant\n")


def test_lengths_of_vocabularies() -> None:
    ids = np.array([0, 1, 2, 3, 9, 2**31], np.uint32)
    byte_level = byte_lengths_of({"<s>": 0, "\u0120the": 1, "\u00c3\u00a9": 2, "a": 3}, [0])
    assert byte_level(ids).tolist() == [0, 4, 2, 1, 0, 0]
    pieces = byte_lengths_of({"<s>": 0, "\u2581the": 1, "é": 2, "<0x0A>": 3}, [0, 77])
    assert pieces(ids).tolist() == [0, 4, 2, 1, 0, 0]
