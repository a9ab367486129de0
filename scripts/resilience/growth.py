"""Growth of a process over time: memory, descriptors, threads, tasks."""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from scipy.stats import theilslopes  # type: ignore[import-untyped]

MEMORY_MB_PER_MINUTE = 0.2
"""Memory slope from which a process leaks: 290 MB per day."""
CONFIDENCE = 0.95
COUNT_SHARE, COUNT_SPARE = 0.1, 4.0
"""Growth of a count within a run that load explains: a share of its median, and some more."""
MIN_SAMPLES = 8


@dataclass(frozen=True, slots=True)
class Sample:
    """State of one process at one moment."""

    process: str
    """Role and process id, such as ``router 4711``."""
    at_s: float
    memory_mb: float
    """Private memory; shared pages do not count."""
    counts: tuple[tuple[str, int], ...]
    """Numbers of descriptors and so on, by name."""


@dataclass(frozen=True, slots=True)
class Growth:
    """Change of one quantity of one process."""

    process: str
    quantity: str
    first: float
    last: float
    per_minute: float
    """Median slope (Theil–Sen)."""
    at_least_per_minute: float
    """Lower end of the slope's confidence interval; noise of a short run widens it."""
    bound_per_minute: float

    @property
    def is_excessive(self) -> bool:
        return self.at_least_per_minute > self.bound_per_minute


def measure_growth(samples: Iterable[Sample], warm_up_s: float, life_s: float) -> list[Growth]:
    """Return the growth of every process that was sampled for ``life_s`` after its warm-up.

    The warm-up begins with the first sample of a process.
    """
    by_process: defaultdict[str, list[Sample]] = defaultdict(list)
    for sample in samples:
        by_process[sample.process].append(sample)
    found = []
    for process, all_samples in by_process.items():
        begin_s = all_samples[0].at_s + warm_up_s
        steady = [sample for sample in all_samples if sample.at_s >= begin_s]
        if len(steady) < MIN_SAMPLES or steady[-1].at_s - begin_s < life_s:
            continue
        minutes = [(sample.at_s - begin_s) / 60 for sample in steady]
        memory_mb = [sample.memory_mb for sample in steady]
        found.append(growth(process, "memory_mb", minutes, memory_mb, MEMORY_MB_PER_MINUTE))
        for name in dict(steady[0].counts):
            values = [float(dict(sample.counts).get(name, 0)) for sample in steady]
            median = sorted(values)[len(values) // 2]
            bound = (COUNT_SHARE * median + COUNT_SPARE) / (minutes[-1] - minutes[0])
            found.append(growth(process, name, minutes, values, bound))
    return found


def growth(
    process: str, quantity: str, minutes: Sequence[float], values: Sequence[float], bound: float
) -> Growth:
    """Return the growth of one series of values."""
    slope, _, low, _ = theilslopes(values, minutes, CONFIDENCE)
    return Growth(process, quantity, values[0], values[-1], float(slope), float(low), bound)
