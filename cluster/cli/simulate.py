"""``tandem simulate``."""

import json
import math
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path

from rich.console import Console
from rich.table import Table

from cluster.admission.fair_queue import QueueLimits
from cluster.autoscaling import Autoscaler, Decision, PoolSignals
from cluster.autoscaling.settings import PoolSettings
from cluster.cli.defaults import load_config
from cluster.config import GeneratorConfig, TandemConfig
from cluster.errors import ConfigError
from cluster.routing import BreakerLimits, PrefixIndex, make_policy
from cluster.simulation.plot import draw
from cluster.simulation.result import Result
from cluster.simulation.settings import LARGE_GPU, Fault, Scaling, Settings, Slo
from cluster.simulation.simulator import simulate
from cluster.simulation.traces import load_trace

_FAULT = re.compile(r"(die|hang|slow):(\d+)@(\d+(?:\.\d*)?)")


@dataclass(frozen=True, slots=True)
class SimulateOptions:
    """Arguments of ``tandem simulate``."""

    trace: str
    policy: str | None
    pool: str | None
    replicas: int | None
    rate: float | None
    duration_s: float | None
    routers: int
    ttft_s: float | None
    itl_s: float | None
    faults: Sequence[str]
    cost: float | None
    seed: int


def run(
    options: SimulateOptions,
    config: Path | None,
    overrides: Sequence[str],
    as_json: bool,
    plot: Path | None,
) -> None:
    """Simulate a trace and print the result.

    Raises:
        ConfigError: the configuration or an option is invalid.
        TraceError: the trace is neither a known name nor a valid file.
    """
    tree = load_config(config, overrides).config
    pool = _pool(tree, options.pool)
    settings = _settings(options, tree, pool)
    trace = load_trace(options.trace, options.rate, options.duration_s, options.seed)
    started = time.perf_counter()
    result = simulate(trace, settings)
    took_s = time.perf_counter() - started
    if plot is not None:
        draw(result, f"{trace.name}, {options.policy or pool.routing}", plot)
    worker = pool.resources
    price = pool.num_workers * tree.accounting.price_per_hour(worker.cpus, worker.gpus)
    summary = result.summary(price if options.cost is None else options.cost)
    if as_json:
        scaled = [asdict(event) for event in result.scale_events]
        print(json.dumps({**summary, "scaled": scaled}, indent=2))
    else:
        _print_events(result)
        _print(summary, tree.accounting.currency if options.cost is None else "")
        text = f"simulated {trace.duration_s / 3600:.2f} h in {took_s:.1f} s; hit rate of an"
        text += f" unlimited prefix cache: {trace.max_hit_rate:.3f}"
        Console().print(text, highlight=False)


def _pool(tree: TandemConfig, name: str | None) -> GeneratorConfig:
    names = [generator.name for generator in tree.generators]
    for generator in tree.generators:
        if name in (None, generator.name):
            return generator
    raise ConfigError(f"--pool: no generator {name!r}; allowed: {', '.join(names)}")


def _settings(options: SimulateOptions, tree: TandemConfig, pool: GeneratorConfig) -> Settings:
    router = tree.router
    name = options.policy or pool.routing
    make_policy(name, PrefixIndex())  # raises if the policy is unknown
    breaker = router.circuit_breaker
    is_timed = pool.sim.prefill_s_per_token or pool.sim.decode_s_per_token
    return Settings(
        engine=pool.sim if is_timed else LARGE_GPU,
        replicas=pool.replicas.min if options.replicas is None else options.replicas,
        policy=lambda index, _truth, seed: make_policy(name, index, seed),
        scaling=_scaling(tree, pool) if options.replicas is None else None,
        faults=tuple(_fault(text) for text in options.faults),
        slo=Slo(
            options.ttft_s or pool.slo.ttft_p90_s or math.inf,
            options.itl_s or pool.slo.itl_p90_s or math.inf,
        ),
        max_in_flight=pool.max_in_flight,
        queue=QueueLimits(router.max_queued_tokens, router.max_queued),
        queue_timeout_s=router.queue_timeout_s,
        start_timeout_s=None if pool.replicas.min else router.start_timeout_s,
        breaker=(
            BreakerLimits(breaker.max_share, breaker.slow_factor) if breaker.enabled else None
        ),
        routers=options.routers,
        seed=options.seed,
    )


def _scaling(tree: TandemConfig, pool: GeneratorConfig) -> Scaling:
    # The budget covers all pools; the pools that are not simulated stay at their minimum.
    parts = [PoolSettings.from_config(tree, tree.router)]
    parts += [PoolSettings.from_config(tree, generator) for generator in tree.generators]
    parts += [PoolSettings.from_config(tree, classifier) for classifier in tree.classifiers]
    autoscaler = Autoscaler({part.pool: part.spec for part in parts}, parts[0].budget)

    def decide(now_s: float, signals: PoolSignals) -> Decision:
        return autoscaler.decide(now_s, {pool.name: signals})[pool.name]

    return Scaling(decide)


def _fault(text: str) -> Fault:
    if (found := _FAULT.fullmatch(text)) is None:
        raise ConfigError(f"--fault: {text!r}; allowed: die|hang|slow:REPLICA@SECONDS")
    kind, replica, at_s = found.groups()
    return Fault(float(at_s), int(replica), kind)  # type: ignore[arg-type]


def _print_events(result: Result) -> None:
    console = Console(soft_wrap=True)
    for event in result.scale_events:
        at = timedelta(seconds=round(event.at_s))
        text = f"{at} from {event.before} to {event.after} replicas ({event.cause}): {event.reason}"
        console.print(text, highlight=False, markup=False)


def _print(summary: Mapping[str, float], currency: str) -> None:
    table = Table(box=None, show_header=False)
    for name, value in summary.items():
        text = f"{value:,.4g}" if isinstance(value, float) else f"{value:,}"
        table.add_row(name, f"{text} {currency}" if name == "cost" else text)
    Console().print(table, highlight=False)
