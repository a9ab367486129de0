from cluster.autoscaling import replicas_for


def test_replicas_for_a_load() -> None:
    assert replicas_for(0, 32) == 0
    assert replicas_for(1, 32) == 1
    assert replicas_for(32, 32) == 1
    assert replicas_for(32.5, 32) == 2
