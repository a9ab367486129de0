"""Slots that a tenant with a backlog leaves to others."""

from collections import Counter

from cluster.admission import MAX_BACKLOG, Headroom
from cluster.admission.headroom import RECENT_S


class World:
    """A tenant ``flood`` with a long queue, and others."""

    def __init__(self) -> None:
        self.queued = Counter(flood=100)
        self.headroom = Headroom(lambda tenant: self.queued[tenant])

    def wanted(self, now_s: float = 0.0, rank: int = 0) -> int:
        return self.headroom.num_wanted("flood", rank, now_s)


def test_without_others_all_slots_are_used() -> None:
    world = World()
    world.headroom.note_arrival("flood", 0, 0.0)
    assert world.wanted() == 0


def test_slots_stay_free_for_some_time_after_a_request_of_another_tenant() -> None:
    world = World()
    world.headroom.note_arrival("small", 0, 0.0)
    assert world.wanted(RECENT_S - 0.1) == 1
    assert world.wanted(RECENT_S) == 0


def test_more_slots_stay_free_for_others_that_have_more_requests() -> None:
    world = World()
    world.headroom.note_arrival("small", 0, 0.0)
    for _ in range(9):
        world.headroom.add_request("small")
    world.headroom.add_request("flood")
    assert world.wanted() == 1 + 3
    for _ in range(9):
        world.headroom.remove_request("small")
    assert world.wanted(0.1) == 1


def test_nothing_is_left_to_tenants_with_a_backlog_or_of_a_lower_class() -> None:
    world = World()
    world.headroom.note_arrival("small", 0, 0.0)
    assert world.wanted(rank=1) == 0
    world.queued["small"] = MAX_BACKLOG + 1
    assert world.wanted() == 0


def test_a_tenant_without_a_backlog_leaves_nothing() -> None:
    world = World()
    world.queued["flood"] = MAX_BACKLOG
    world.headroom.note_arrival("small", 0, 0.0)
    assert world.wanted() == 0


def test_old_tenants_are_forgotten() -> None:
    world = World()
    for number in range(1000):
        world.headroom.note_arrival(f"tenant{number}", 0, number * 1.0)
    assert len(world.headroom._recent) <= RECENT_S + 1
