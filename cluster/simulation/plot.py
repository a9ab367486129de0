"""Plot of a simulation: load, replicas and latency over time."""

from collections import defaultdict
from itertools import pairwise
from pathlib import Path

from cluster.errors import ConfigError
from cluster.simulation.histogram import LogHistogram
from cluster.simulation.result import Result

NUM_POINTS = 120


def draw(result: Result, title: str, path: Path) -> None:
    """Write a plot; the format follows from the path's suffix.

    Raises:
        ConfigError: matplotlib is not installed, or the file cannot be written.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ConfigError("--plot needs matplotlib: pip install matplotlib") from None
    figure = Figure(figsize=(10, 8), layout="constrained")
    load, replicas, latency = figure.subplots(3, 1, sharex=True)
    samples = result.samples
    minutes = [sample.at_s / 60 for sample in samples]
    gaps = [b.at_s - a.at_s for a, b in pairwise(samples)]
    rates = [sample.arrivals / gap for sample, gap in zip(samples[1:], gaps, strict=True)]
    load.plot(minutes[1:], rates, label="requests/s")
    load.plot(minutes, [sample.in_flight for sample in samples], label="in flight")
    load.plot(minutes, [sample.queued for sample in samples], label="queued in routers")
    ready = [sample.ready for sample in samples]
    requested = [sample.ready + sample.starting for sample in samples]
    replicas.step(minutes, requested, where="post", label="requested", linestyle=":")
    replicas.step(minutes, ready, where="post", label="ready")
    for percent in (50, 90, 99):
        points = _ttft(result, percent)
        latency.plot([at for at, _ in points], [s for _, s in points], label=f"TTFT p{percent}")
    latency.axhline(result.slo.ttft_s, color="grey", linestyle="--", label="objective")
    latency.set_yscale("log")
    for axes, name in ((load, "load"), (replicas, "replicas"), (latency, "seconds")):
        axes.set_ylabel(name)
        axes.legend(loc="upper left", fontsize="small")
    latency.set_xlabel("minutes")
    figure.suptitle(title)
    try:
        figure.savefig(path)
    except (OSError, ValueError) as error:
        raise ConfigError(f"--plot {path}: {error}") from None


def _ttft(result: Result, percent: float) -> list[tuple[float, float]]:  # (minute, seconds)
    end_s = max((request.spec.arrival_s for request in result.requests), default=0.0)
    part_s = max(end_s / NUM_POINTS, 1e-9)
    parts: dict[int, LogHistogram] = defaultdict(LogHistogram)
    for request in result.requests:
        if (ttft_s := request.ttft_s) is not None:
            parts[int(request.spec.arrival_s / part_s)].add(ttft_s)
    return [((at + 0.5) * part_s / 60, parts[at].percentile(percent)) for at in sorted(parts)]
