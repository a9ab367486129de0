from cluster.routing import LeastLoad, ReplicaView


def test_the_least_loaded_replica_is_chosen() -> None:
    views = [ReplicaView("a", 3, 8), ReplicaView("b", 1, 8), ReplicaView("c", 2, 8)]
    assert LeastLoad().choose(views) == "b"


def test_equals_take_turns() -> None:
    policy = LeastLoad()
    views = [ReplicaView(name, 0, 8) for name in "abc"]
    chosen = [policy.choose(views) for _ in range(6)]
    assert sorted(chosen) == ["a", "a", "b", "b", "c", "c"]


def test_full_replicas_are_passed_over() -> None:
    views = [ReplicaView("a", 2, 2), ReplicaView("b", 7, 8)]
    assert LeastLoad().choose(views) == "b"
    assert LeastLoad().choose(views[:1]) is None
    assert LeastLoad().choose([]) is None
