"""Pinning of compute threads, by the cores that Linux reports for each thread."""

import os
import threading

import pytest
import torch

from cluster.engines.classifier.model.device import pin_threads


def in_a_thread(function):
    found = []
    thread = threading.Thread(target=lambda: found.append(function()))
    thread.start()
    thread.join()
    return found[0]


def compute() -> None:
    torch.ones(1 << 20).sum()


def cores_of_new_threads(before: set[str]) -> list[set[int]]:
    new = set(os.listdir("/proc/self/task")) - before
    return [os.sched_getaffinity(int(thread)) for thread in sorted(new, key=int)]


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two cores")
def test_the_team_is_pinned_to_the_other_cores():
    def pin():
        first, second, *_ = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {first, second})
        torch.set_num_threads(1)  # torch starts its global threads here
        before = set(os.listdir("/proc/self/task"))
        pin_threads()
        made = cores_of_new_threads(before)
        for number in (1, 2, 1, 2):  # batches on one core and on all cores
            torch.set_num_threads(number)
            compute()
        return first, second, os.sched_getaffinity(0), made, cores_of_new_threads(before)

    first, second, own, made, kept = in_a_thread(pin)
    assert own == {first}
    assert made == [{second}]
    assert kept == made


def test_a_single_core_is_not_pinned():
    def pin():
        core = min(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {core})
        pin_threads()
        return os.sched_getaffinity(0) == {core}

    assert in_a_thread(pin)
