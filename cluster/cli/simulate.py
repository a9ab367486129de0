"""``tandem simulate``."""

import json
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from cluster.admission.fair_queue import QueueLimits
from cluster.autoscaling import Autoscaler, PoolSignals
from cluster.autoscaling.settings import PoolSettings
from cluster.cli.paths import load_config
from cluster.config import GeneratorConfig, SimConfig, TandemConfig
from cluster.errors import ConfigError
from cluster.routing import PrefixIndex, make_policy
from cluster.simulation.plot import draw
from cluster.simulation.requests import Trace
from cluster.simulation.result import Result
from cluster.simulation.settings import LARGE_GPU, Fault, Scaling, Settings, Slo
from cluster.simulation.simulator import simulate
from cluster.simulation.traces import load

_FAULT = re.compile(r"(die|hang|slow):(\d+)@(\d+(?:\.\d*)?)")


@dataclass(frozen=True, slots=True)
class Options:
    """What the command line says."""

    trace: str
    policy: str | None
    pool: str | None
    replicas: int | None
    rate: float | None
    duration_s: float | None
    routers: int
    slo: Slo
    faults: Sequence[str]
    cost: float
    seed: int


def run(
    options: Options,
    config: Path | None,
    overrides: Sequence[str],
    as_json: bool,
    plot: Path | None,
) -> None:
    """Simulate, and print what came of it.

    Raises:
        ConfigError: the configuration or an option is wrong.
        TraceError: the trace is no name, or its file is malformed.
    """
    tree = load_config(config, overrides).config
    pool = _pool(tree, options.pool)
    settings = _settings(options, tree, pool)
    trace = load(options.trace, options.rate, options.duration_s, options.seed)
    began = time.perf_counter()
    result = simulate(trace, settings)
    took_s = time.perf_counter() - began
    if plot is not None:
        draw(result, f"{trace.name}, {options.policy or pool.routing}", plot)
    if as_json:
        print(json.dumps(_as_json(result, options), indent=2))
    else:
        _print(result, options, trace, took_s)


def _pool(tree: TandemConfig, name: str | None) -> GeneratorConfig:
    names = [generator.name for generator in tree.generators]
    for generator in tree.generators:
        if name in (None, generator.name):
            return generator
    raise ConfigError(f"--pool: no generator is called {name!r}; there are: {', '.join(names)}")


def _settings(options: Options, tree: TandemConfig, pool: GeneratorConfig) -> Settings:
    router = tree.router
    name = options.policy or pool.routing
    make_policy(name, PrefixIndex())  # says whether there is such a one
    return Settings(
        engine=_engine(pool.sim),
        replicas=pool.replicas.min if options.replicas is None else options.replicas,
        policy=lambda index, _truth, seed: make_policy(name, index, seed),
        scaling=_scaling(tree, pool) if options.replicas is None else None,
        faults=tuple(_fault(text) for text in options.faults),
        slo=options.slo,
        max_ongoing=pool.max_ongoing,
        queue=QueueLimits(router.max_queued_tokens, router.max_queued),
        queue_timeout_s=router.queue_timeout_s,
        start_timeout_s=None if pool.replicas.min else router.start_timeout_s,
        routers=options.routers,
        seed=options.seed,
    )


def _engine(sim: SimConfig) -> SimConfig:
    if sim.prefill_s_per_token or sim.decode_s_per_token:
        return sim
    return LARGE_GPU


def _scaling(tree: TandemConfig, pool: GeneratorConfig) -> Scaling:
    spec = PoolSettings.of(tree, pool).spec
    autoscaler = Autoscaler({pool.name: spec})

    def decide(now_s: float, signals: PoolSignals) -> int:
        return autoscaler.decide(now_s, {pool.name: signals})[pool.name].target

    return Scaling(decide)


def _fault(text: str) -> Fault:
    match _FAULT.fullmatch(text):
        case None:
            raise ConfigError(f"--fault: {text!r}; allowed: die|hang|slow:REPLICA@SECONDS")
        case found:
            kind, replica, at_s = found.groups()
            return Fault(float(at_s), int(replica), kind)  # type: ignore[arg-type]


def _as_json(result: Result, options: Options) -> dict[str, object]:
    events = [(e.at_s, e.before, e.after) for e in result.scale_events]
    return {**result.summary(options.cost), "scaled": events}


def _print(result: Result, options: Options, trace: Trace, took_s: float) -> None:
    table = Table(box=None, show_header=False)
    for name, value in result.summary(options.cost).items():
        table.add_row(name, f"{value:,.4g}" if isinstance(value, float) else f"{value:,}")
    console = Console()
    console.print(table, highlight=False)
    hours = trace.duration_s / 3600
    text = f"{hours:.2f} h in {took_s:.1f} s; a cache without a bound would hit"
    console.print(f"{text} {trace.most_hits:.3f}", highlight=False)
