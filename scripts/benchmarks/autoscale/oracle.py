"""Who knows what comes: a bound below which no policy with the same start-up time gets far.

It knows the work of every request and when it arrives. Replicas are asked for one start-up before
they are needed and go as soon as they are not, without a delay.
"""

import numpy as np

from cluster.autoscaling import Decision, PoolSignals
from cluster.config import SimConfig
from cluster.simulation.requests import Trace

SMOOTHING_S = 30.0
"""Work that comes within this time may as well be done at another moment of it: the most that
requests may wait is of this order."""
STEP_S = 2.0


def work_rates(trace: Trace, engine: SimConfig) -> np.ndarray:
    """Replicas that the requests of each ``STEP_S`` would keep busy, smoothed, shape (steps,)."""
    each_s = engine.decode_s_per_token * engine.batch_slowdown
    steps = int(trace.duration_s / STEP_S) + 1
    work = np.zeros(steps)
    for request in trace.requests:
        prefill_s = request.prompt_tokens * engine.prefill_s_per_token
        decode_s = request.completion_tokens * each_s
        work[int(request.arrival_s / STEP_S)] += (prefill_s + decode_s) / STEP_S
    width = round(SMOOTHING_S / STEP_S)
    return np.convolve(work, np.ones(width) / width, mode="same")


class Oracle:
    """Has as many replicas as are busy for ``load`` of their time, of the work that is known."""

    def __init__(self, rates: np.ndarray, load: float, startup_s: float) -> None:
        ahead = int(startup_s / STEP_S) + 2
        padded = np.concatenate([rates, np.zeros(ahead)])
        windows = np.lib.stride_tricks.sliding_window_view(padded, ahead + 1)[: len(rates)]
        self._targets = np.maximum(1, np.ceil(windows.max(axis=1) / load)).astype(int)

    def decide(self, now: float, _signals: PoolSignals) -> Decision:
        """The target at ``now`` (seconds)."""
        step = min(int(now / STEP_S), len(self._targets) - 1)
        target = int(self._targets[step])
        return Decision(target, target, "oracle", "what comes is known")
