import random
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.admission.fair_queue import THRESHOLD, FairQueue, QueueEntry, QueueLimits

ROOMY = QueueLimits(tokens=1e9, entries=10**6)


def entry(
    tenant: str, work: float = 10, *, expires: float = 60, weight: float = 1, priority: int = 0
) -> QueueEntry[str]:
    return QueueEntry(tenant, tenant, work, expires, weight, priority)


def order(queue: FairQueue[str]) -> list[str]:
    return [queue.pop().item for _ in range(len(queue))]


def test_a_single_tenant_is_served_in_order_of_arrival() -> None:
    queue: FairQueue[int] = FairQueue(ROOMY)
    for number in range(5):
        assert queue.push(QueueEntry(number, "a", 1, 60))
    assert [queue.pop().item for _ in range(5)] == [0, 1, 2, 3, 4]
    assert queue.peek() is None
    with pytest.raises(IndexError):
        queue.pop()


def test_a_tenants_earliest_deadline_is_served_first() -> None:
    queue: FairQueue[float] = FairQueue(ROOMY)
    for expires in (30.0, 10.0, 20.0):
        queue.push(QueueEntry(expires, "a", 1, expires))
    assert [queue.pop().item for _ in range(3)] == [10, 20, 30]


def test_higher_classes_are_served_first_and_weight_0_last() -> None:
    queue: FairQueue[str] = FairQueue(ROOMY)
    queue.push(entry("background", weight=0, priority=8))
    queue.push(entry("batch", priority=-1))
    queue.push(entry("usual"))
    queue.push(entry("urgent", priority=3))
    assert order(queue) == ["urgent", "usual", "batch", "background"]


def test_tenants_of_weight_0_share_evenly_if_no_other_tenant_waits() -> None:
    queue: FairQueue[str] = FairQueue(ROOMY)
    for tenant in ("a", "a", "a", "b", "b", "b"):
        queue.push(entry(tenant, weight=0))
    assert Counter(order(queue)[:4]) == {"a": 2, "b": 2}


@given(
    st.dictionaries(
        st.sampled_from("abcdef"),
        st.tuples(st.sampled_from([0.5, 1, 2, 5]), st.floats(1, 100)),
        min_size=2,
    ),
    st.integers(0, 2**32),
)
def test_waiting_tenants_get_shares_by_weight(
    tenants: dict[str, tuple[float, float]], seed: int
) -> None:
    """Bound of start-time fair queueing: work / weight differs by at most one request of each."""
    draw = random.Random(seed)
    queue: FairQueue[str] = FairQueue(ROOMY)
    served: Counter[str] = Counter()
    largest = dict.fromkeys(tenants, 0.0)

    def more(tenant: str) -> None:
        weight, scale = tenants[tenant]
        work = draw.uniform(0.1, scale)
        largest[tenant] = max(largest[tenant], work)
        assert queue.push(entry(tenant, work, weight=weight))

    for tenant in tenants:
        more(tenant)
        more(tenant)
    for _ in range(300):
        taken = queue.pop()
        served[taken.tenant] += taken.work_tokens
        more(taken.tenant)
    normal = {t: served[t] / weight for t, (weight, _) in tenants.items()}
    slack = {t: largest[t] / weight for t, (weight, _) in tenants.items()}
    for a in tenants:
        for b in tenants:
            assert abs(normal[a] - normal[b]) <= slack[a] + slack[b] + 1e-6


def test_tenants_with_a_backlog_can_be_left_out_within_the_highest_class() -> None:
    queue: FairQueue[str] = FairQueue(ROOMY)
    for tenant in ("flood", "flood", "flood", "small", "other"):
        queue.push(entry(tenant))
    queue.push(entry("small"))
    queue.push(entry("lower", priority=-1))
    served = []
    while (found := queue.peek_without_backlog(2)) is not None:
        queue.take(found)
        served.append(found.item)
        queue.push(entry("flood"))  # its backlog stays
    assert served == ["small", "other", "small"]
    assert queue.num_of("flood") == 6
    assert queue.num_of("small") == 0


def test_a_late_tenant_gets_no_credit_and_does_not_wait_for_a_backlog() -> None:
    queue: FairQueue[str] = FairQueue(ROOMY)
    for _ in range(100):
        queue.push(entry("flood"))
    for _ in range(50):
        queue.pop()
    for _ in range(10):
        queue.push(entry("small"))
    assert Counter(order(queue)[:20]) in ({"flood": 10, "small": 10}, {"flood": 11, "small": 9})


def test_a_charge_for_work_elsewhere_lets_other_tenants_go_first() -> None:
    queue: FairQueue[str] = FairQueue(ROOMY)
    for _ in range(10):
        queue.push(entry("a"))
        queue.push(entry("b"))
    queue.charge("a", 0, 1, 50)
    assert Counter(order(queue)[:9]) == {"b": 7, "a": 2}
    queue.charge("absent", 0, 1, 50)
    queue.charge("a", 5, 1, 50)


def test_overestimated_work_is_refunded_without_further_credit() -> None:
    queue: FairQueue[str] = FairQueue(ROOMY)
    for _ in range(10):
        queue.push(entry("a", 100))
        queue.push(entry("b", 100))
    assert {queue.pop().item, queue.pop().item} == {"a", "b"}
    queue.charge("a", 0, 1, -1e9)
    served = [queue.pop().item for _ in range(3)]
    assert served[0] == "a"
    assert "b" in served


def test_a_flood_leaves_room_for_others_within_the_queues_limits() -> None:
    queue: FairQueue[str] = FairQueue(QueueLimits(tokens=1000, entries=10**6))
    flood = 0
    while queue.push(entry("flood")):
        flood += 1
    assert queue.tokens == pytest.approx(1000 * THRESHOLD / (THRESHOLD + 1), abs=20)
    assert queue.push(entry("small"))
    for number in range(200):
        queue.push(entry(f"t{number}"))
    assert queue.tokens <= 1000
    queue = FairQueue(QueueLimits(tokens=1e9, entries=2))
    assert [queue.push(entry("a")) for _ in range(3)] == [True, True, False]
    assert not FairQueue(QueueLimits(tokens=1e9, entries=0)).push(entry("a"))


def test_a_tenant_cannot_fill_the_queue_by_spreading_over_classes() -> None:
    queue: FairQueue[str] = FairQueue(QueueLimits(tokens=1e9, entries=1024))
    pushed = [queue.push(entry("flood", priority=-number % 8)) for number in range(2000)]
    assert sum(pushed) == pytest.approx(1024 * THRESHOLD / (THRESHOLD + 1), abs=1)
    assert queue.push(entry("small", priority=-8))


def test_a_higher_class_displaces_the_largest_tenant_of_the_lowest_class() -> None:
    queue: FairQueue[str] = FairQueue(QueueLimits(tokens=1e9, entries=9))
    for tenant, priority in (("usual", 0), ("flood", -1), ("flood", -1), ("other", -1)):
        assert queue.push(entry(tenant, priority=priority))
    for number in range(5):
        assert queue.push(entry(f"t{number}"))
    new = entry("urgent", priority=1)
    assert not queue.push(new)
    assert [loser.tenant for loser in queue.displace(new)] == ["flood"]
    assert queue.push(new)
    assert not queue.displace(entry("late", priority=-1))  # no class is lower
    assert len(queue) == 9


def test_nothing_is_displaced_if_that_does_not_make_enough_room() -> None:
    queue: FairQueue[str] = FairQueue(QueueLimits(tokens=100, entries=9))
    assert queue.push(entry("a", 60))
    assert queue.push(entry("b", 30, priority=-1))
    assert not queue.displace(entry("urgent", 50, priority=0))
    assert len(queue) == 2


def test_a_request_larger_than_the_queue_may_wait_alone() -> None:
    queue: FairQueue[str] = FairQueue(QueueLimits(tokens=100, entries=10))
    assert queue.push(entry("a", 5000))
    assert not queue.push(entry("b", 1))
    assert queue.pop().item == "a"


def test_tokens_before_a_request_depend_on_its_share() -> None:
    queue: FairQueue[str] = FairQueue(ROOMY)
    assert queue.tokens_before(entry("a")) == 0
    for _ in range(100):
        queue.push(entry("flood"))
    assert queue.tokens_before(entry("flood")) == 1000
    assert queue.tokens_before(entry("small")) == 10
    assert queue.tokens_before(entry("small", weight=0.1)) == pytest.approx(100)
    assert queue.tokens_before(entry("urgent", priority=1)) == 0
    assert queue.tokens_before(entry("background", weight=0)) == 1000
    queue.push(entry("small"))
    assert queue.tokens_before(entry("small")) == 30


def test_a_changed_weight_applies_from_the_next_request() -> None:
    queue: FairQueue[str] = FairQueue(ROOMY)
    for _ in range(200):
        queue.push(entry("a"))
        queue.push(entry("b"))
    assert Counter(queue.pop().item for _ in range(40)) == {"a": 20, "b": 20}
    queue.push(entry("a", weight=3))
    served = Counter(queue.pop().item for _ in range(40))
    assert served["a"] == pytest.approx(30, abs=1)
    for _ in range(3):
        queue.push(entry("a", weight=0))  # later requests are in the background class
    assert order(queue)[-3:] == ["a"] * 3


@given(st.lists(st.tuples(st.sampled_from("pqrx"), st.integers(0, 5), st.integers(0, 3))))
def test_no_entry_is_lost_or_served_twice(steps: list[tuple[str, int, int]]) -> None:
    queue: FairQueue[int] = FairQueue(QueueLimits(tokens=120, entries=12))
    waiting: dict[int, QueueEntry[int]] = {}
    for number, (step, tenant, priority) in enumerate(steps):
        if step in "pq":
            one = QueueEntry(number, f"t{tenant}", 10.0 + tenant, 60.0, float(tenant % 3), priority)
            accepted = queue.push(one)
            if not accepted and (losers := queue.displace(one)):
                for loser in losers:
                    del waiting[loser.item]
                accepted = queue.push(one)
                assert accepted
            if accepted:
                waiting[number] = one
        elif step == "r" and waiting:
            queue.remove(gone := waiting.pop(min(waiting)))
            queue.remove(gone)
        elif step == "x" and waiting:
            del waiting[queue.pop().item]
        assert len(queue) == len(waiting)
        assert queue.tokens == pytest.approx(sum(e.work_tokens for e in waiting.values()))
    assert {e.item for e in queue.drain()} == waiting.keys()
    assert len(queue) == 0
    assert queue.tokens == 0


def test_removed_entries_do_not_accumulate() -> None:
    queue: FairQueue[str] = FairQueue(ROOMY)
    queue.push(entry("a"))
    for _ in range(5000):
        one, other = entry("a"), entry("b")
        queue.push(one)
        queue.push(other)
        queue.remove(one)
        queue.remove(other)
    assert queue.num_heap_items < 200  # of 10,000 that were pushed
