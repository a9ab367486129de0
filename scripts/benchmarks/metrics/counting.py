"""CPU time of the metrics code per streamed token, measured in process.

Includes everything that a router updates for a stream: the meter of the pool, the tenant's quotas,
the sums of ``/v1/usage`` and the request log. Each token is a separate write here; a busy router
puts several into one.
"""

import logging
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from time import perf_counter, thread_time

from benchmarks.stream.measure import PATH, TOKENS
from benchmarks.targets.running import SIM_MODEL, sim_generator
from cluster.accounting.usage_log import UsageLog
from cluster.admission import Identity, Tenant
from cluster.config import parse
from cluster.gateway import UsageAccount
from cluster.gateway.admission.quotas import TenantQuotas
from cluster.gateway.messages import Request
from cluster.gateway.recording.observer import PoolMeter, RequestSinks
from cluster.gateway.recording.request_log import LOGGER, RequestLog
from cluster.metrics import Registry
from cluster.usage import Usage
from deployments.logs import close_request_log, open_request_log

STREAMS = 2000
_USAGE = Usage(prompt_tokens=16, cached_tokens=0, completion_tokens=TOKENS)
_SENDER = Identity(Tenant("tenant"))
_REQUEST = Request("id", "POST", PATH, b"", [], b"{}", _SENDER)


def us_per_token(streams: int = STREAMS) -> float:
    """Return CPU microseconds per token, including a share of the costs per stream."""
    with _make_counters() as (meter, quotas):
        _count_streams(meter, quotas, streams // 10)  # creates every series
        began = thread_time()
        _count_streams(meter, quotas, streams)
        used_s = thread_time() - began
    counted = sum(meter.itl_s.counts) + sum(meter.ttft_s.counts)
    assert counted == (streams + streams // 10) * TOKENS
    return used_s / (streams * TOKENS) * 1e6


def _count_streams(meter: PoolMeter, quotas: TenantQuotas, streams: int) -> None:
    for _ in range(streams):
        ticket = quotas.admit(_SENDER, SIM_MODEL, (144.0, 16.0))
        observer = meter.observe(_REQUEST, PATH, ticket.end)
        observer.slot_taken("replica")
        observer.status = 200
        for _ in range(TOKENS):
            observer.write_times.append(perf_counter())
        observer.end(_USAGE)


@contextmanager
def _make_counters() -> Iterator[tuple[PoolMeter, TenantQuotas]]:
    """Yield a router's counters in the default configuration; only the request log is written."""
    config = parse({"generators": [sim_generator(0.0)]})
    registry = Registry()
    request_log = RequestLog(config.router.log_requests_per_s)
    with tempfile.TemporaryDirectory(prefix="bench-metrics-") as folder:
        usage = UsageAccount(config, UsageLog(Path(folder) / "usage", config.accounting.keep_days))
        handler = open_request_log(Path(folder), "benchmark")
        try:
            yield (
                PoolMeter(SIM_MODEL, RequestSinks(registry, request_log, usage=usage)),
                TenantQuotas(registry),
            )
        finally:
            close_request_log(handler)
            logging.getLogger(LOGGER).setLevel(logging.NOTSET)
