"""Routers' view of an engine's prefix cache equals the contents of its KV blocks."""

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.config import SimConfig
from cluster.engines import prefix_cache
from cluster.engines.prefix_cache import PrefixTracker, make_byte_lengths
from cluster.engines.sim import tokenizer
from cluster.engines.sim.blocks import block_hashes
from cluster.engines.sim.scheduler import Scheduler, SimRequest
from cluster.link import PrefixEvents
from cluster.routing import Fingerprint

BLOCK = 4
PREFIX_BYTES = 20


def make_fingerprint(text: str) -> Fingerprint:
    """Return a fingerprint with a prefix every 20 bytes, so that small prompts have many."""
    ends = tuple(range(PREFIX_BYTES, len(text) + 1, PREFIX_BYTES))
    return Fingerprint(tuple(hash(text[:end]) & (2**64 - 1) for end in ends), ends, len(text))


def make_tracker(**limits: int) -> PrefixTracker:
    return PrefixTracker(BLOCK, tokenizer.byte_lengths, **limits)


class Router:
    """Applies the events it receives."""

    def __init__(self) -> None:
        self.cached: set[int] = set()

    def apply(self, events: PrefixEvents | None) -> None:
        if events is not None:
            self.cached = set() if events.cleared else self.cached
            self.cached -= set(events.removed)
            self.cached |= set(events.stored)


class Fleet:
    """A simulated engine, and routers that follow its tracker; some join late."""

    def __init__(self, num_blocks: int) -> None:
        self.tracker = make_tracker()
        config = SimConfig(num_kv_blocks=num_blocks, block_size_tokens=BLOCK, max_num_seqs=3)
        self.scheduler = Scheduler(config, lambda: 0.0, self.tracker)
        self.routers = [Router()]
        self.last_blocks: dict[int, set[int]] = {}  # last blocks of each prefix

    def ask(self, text: str, max_tokens: int) -> SimRequest | None:
        ids = tokenizer.encode(text)
        if not ids or len(ids) + max_tokens > self.scheduler.max_request_tokens:
            return None
        request = SimRequest(list(ids), max_tokens, lambda: 7)
        self.scheduler.add_request(request)
        prefixes = make_fingerprint(text)
        self.tracker.add_prompt(prefixes, ids)
        blocks = block_hashes(ids, BLOCK)
        for prefix, end in zip(prefixes.hashes, prefixes.ends, strict=True):
            count = max(1, len(tokenizer.encode(text[:end])) // BLOCK)
            if blocks:
                self.last_blocks.setdefault(prefix, set()).add(blocks[min(count, len(blocks)) - 1])
        return request

    def step(self) -> None:
        step = self.scheduler.plan()
        if step is not None:
            self.scheduler.commit(step)

    def publish(self) -> None:
        events = self.tracker.take_events()
        for router in self.routers:
            router.apply(events)

    def join(self) -> None:
        router = Router()
        router.apply(PrefixEvents(stored=self.tracker.snapshot(), cleared=True))
        self.routers.append(router)

    def truth(self) -> set[int]:
        pool = self.scheduler.blocks
        return {
            prefix
            for prefix, blocks in self.last_blocks.items()
            if any(pool.count_cached([block]) for block in blocks)
        }


# Whole tokens of four bytes, so that no prefix ends within one.
pieces = st.sampled_from([" one", " two", " six", " ten", " abc"])
beginnings = st.sampled_from([" sys" * 30, " Sys" * 12, " SYS" * 25, " syS" * 20])
prompts = st.builds(lambda start, rest: start + "".join(rest), beginnings, st.lists(pieces))
moves = st.one_of(
    st.tuples(st.just("ask"), prompts, st.integers(1, 6)),
    st.tuples(st.just("ask"), prompts, st.integers(1, 6)),
    st.tuples(st.just("step"), st.integers(1, 30)),
    st.tuples(st.sampled_from(["publish", "join", "abort"])),
)


@settings(max_examples=300)
@given(st.integers(12, 60), st.lists(moves, min_size=12, max_size=60))
def test_routers_know_exactly_the_cached_prefixes(num_blocks: int, moves: Sequence[tuple]) -> None:  # type: ignore[type-arg]
    fleet = Fleet(num_blocks)
    requests: list[SimRequest] = []
    for name, *arguments in moves:
        if name == "ask" and (request := fleet.ask(*arguments)) is not None:
            requests.append(request)
        elif name == "step":
            for _ in range(arguments[0]):
                fleet.step()
        elif name == "abort" and requests:
            fleet.scheduler.abort(requests.pop())
        elif name in ("publish", "join"):
            getattr(fleet, name)()
    fleet.publish()
    for router in fleet.routers:
        assert router.cached == fleet.truth()


def test_a_prefix_is_cached_while_its_last_whole_block_is() -> None:
    tracker = make_tracker()
    ids = list(range(0x20202020, 0x20202020 + 12))
    text = Fingerprint((1, 2, 3), (14, 35, 48), 48)  # 3.5, 8.75 and 12 tokens
    tracker.add_prompt(text, ids)
    assert tracker.take_events() is None
    tracker.add_blocks(["a"], None, ids[:4])
    assert tracker.take_events() == PrefixEvents(stored=[1], removed=[])
    tracker.add_blocks(["b", "c"], "a", ids[4:])
    assert tracker.take_events() == PrefixEvents(stored=[3, 2], removed=[])
    tracker.remove_blocks(["c"])
    assert tracker.take_events() == PrefixEvents(stored=[], removed=[3])
    tracker.remove_blocks(["b", "a"])
    assert tracker.take_events() == PrefixEvents(stored=[], removed=[2, 1])
    assert tracker.snapshot() == []


def test_a_prompt_may_be_added_after_its_blocks() -> None:
    tracker = make_tracker()
    ids = list(range(0x20202020, 0x20202020 + 8))
    tracker.add_blocks(["a", "b"], None, ids)
    tracker.add_prompt(Fingerprint((1, 2), (16, 32), 32), ids)
    assert set(tracker.snapshot()) == {1, 2}


def test_a_prefix_of_two_prompts_is_cached_while_one_of_its_blocks_is() -> None:
    tracker = make_tracker()
    for name, start in (("a", 0), ("b", 50)):  # the same text, tokenized differently
        ids = list(range(0x20202020 + start, 0x20202020 + start + 4))
        tracker.add_prompt(Fingerprint((1,), (16,), 16), ids)
        tracker.add_blocks([name], None, ids)
    tracker.remove_blocks(["a"])
    assert tracker.snapshot() == [1]
    tracker.remove_blocks(["b"])
    assert tracker.snapshot() == []


def test_a_block_cached_repeatedly_is_gone_when_all_copies_are() -> None:
    tracker = make_tracker()
    ids = [0x20202020] * 4
    tracker.add_prompt(Fingerprint((1,), (16,), 16), ids)
    for _ in range(3):
        tracker.add_blocks(["a"], None, ids)
    for _ in range(2):
        tracker.remove_blocks(["a"])
        assert tracker.snapshot() == [1]
    tracker.remove_blocks(["a"])
    assert tracker.snapshot() == []


def test_blocks_of_adapters_are_separate() -> None:
    tracker = make_tracker()
    ids = [0x20202020] * 4
    tracker.add_prompt(Fingerprint((1,), (16,), 16), ids, "lora")
    tracker.add_blocks(["a"], None, ids)
    assert tracker.snapshot() == []
    tracker.add_blocks(["b"], None, ids, "lora")
    assert tracker.snapshot() == [1]


def test_blocks_after_an_unknown_parent_or_with_missing_tokens_are_ignored() -> None:
    tracker = make_tracker()
    ids = [0x20202020] * 8
    tracker.add_prompt(Fingerprint((1, 2), (16, 32), 32), ids)
    tracker.add_blocks(["b"], "lost", ids[4:])
    tracker.add_blocks(["a"], None, ids[:3])
    tracker.remove_blocks(["never"])
    assert tracker.snapshot() == []


def test_clear_is_reported_once() -> None:
    tracker = make_tracker()
    ids = [0x20202020] * 4
    for _ in range(2):
        tracker.add_prompt(Fingerprint((1,), (16,), 16), ids)
        tracker.add_blocks(["a"], None, ids)
        assert tracker.snapshot() == [1]
        tracker.clear()
        assert tracker.take_events() == PrefixEvents(stored=[], cleared=True)
        assert tracker.take_events() is None


def test_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefix_cache, "MAX_AWAITED_BLOCKS", 10)
    monkeypatch.setattr(prefix_cache, "MAX_CHANGES", 15)
    tracker = make_tracker(max_prefixes=20)
    router = Router()
    for number in range(100):
        ids = [0x20202020 + number] * 4
        tracker.add_prompt(Fingerprint((number,), (16,), 16), ids)
        tracker.add_prompt(
            Fingerprint((1000 + number,), (16,), 16), [number + 300] * 4
        )  # never stored
        tracker.add_blocks([number], None, ids)
        tracker.add_prompt(Fingerprint((number,), (16,), 16), ids)
    assert list(tracker.snapshot()) == list(range(80, 100))
    events = tracker.take_events()
    assert events is not None
    assert events.cleared  # more changes than are reported one by one
    router.apply(events)
    assert router.cached == set(tracker.snapshot())
    for number in (0, 99):  # of the blocks never stored, only the newest are still awaited
        tracker.add_blocks([1000 + number], None, [number + 300] * 4)
    assert 1099 in tracker.snapshot()
    assert 1000 not in tracker.snapshot()


def test_the_limit_drops_ends_of_prompts_before_their_starts() -> None:
    ids = list(range(0x20202020, 0x20202020 + 12))
    text = Fingerprint((1, 2, 3), (16, 32, 48), 48)
    for blocks_first in (False, True):
        tracker = make_tracker(max_prefixes=2)
        if not blocks_first:
            tracker.add_prompt(text, ids)
        tracker.add_blocks(["a", "b", "c"], None, ids)
        tracker.add_prompt(text, ids)
        assert set(tracker.snapshot()) == {1, 2}


def test_changes_are_announced_once_until_they_are_taken() -> None:
    tracker, calls = make_tracker(), []
    tracker.on_change = lambda: calls.append(1)
    ids = list(range(0x20202020, 0x20202020 + 8))
    tracker.add_prompt(Fingerprint((1, 2), (16, 32), 32), ids)
    tracker.add_blocks(["a", "b"], None, ids)
    assert len(calls) == 1
    tracker.take_events()
    tracker.clear()
    assert len(calls) == 2


@given(st.text(max_size=50))
def test_byte_lengths_of_the_simulated_tokenizer(text: str) -> None:
    ids = tokenizer.encode(text)
    lengths = tokenizer.byte_lengths(np.array(ids, np.uint32))
    assert lengths.tolist() == [len(tokenizer.piece_of(token).encode()) for token in ids]


def test_special_tokens_have_no_length() -> None:
    ids = tokenizer.encode_chat([("user", "Hi")], True)
    lengths = tokenizer.byte_lengths(np.array(ids, np.uint32))
    assert lengths.sum() == len("user\nHi\nassistant\n")


def test_byte_lengths_of_byte_level_and_sentencepiece_vocabularies() -> None:
    ids = np.array([0, 1, 2, 3, 9, 2**31], np.uint32)
    byte_level = make_byte_lengths({"<s>": 0, "\u0120the": 1, "\u00c3\u00a9": 2, "a": 3}, [0])
    assert byte_level(ids).tolist() == [0, 4, 2, 1, 0, 0]
    pieces = make_byte_lengths({"<s>": 0, "\u2581the": 1, "é": 2, "<0x0A>": 3}, [0, 77])
    assert pieces(ids).tolist() == [0, 4, 2, 1, 0, 0]
