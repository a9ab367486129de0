"""What counting one streamed token takes, in process: everything that a stream's life triggers.

The meter of a pool, the tenant's account, the sums of ``/v1/usage`` and the request log, as a
router has them. Each token is a write of its own here, where a busy router puts several into one.
"""

import logging
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from time import perf_counter, thread_time

from benchmarks.stream.cell import PATH, TOKENS
from benchmarks.targets.running import MODEL, generator
from cluster.accounting.usage_log import UsageLog
from cluster.admission import OPEN
from cluster.config import parse
from cluster.gateway import UsageAccount
from cluster.gateway.admission.quotas import TenantQuotas
from cluster.gateway.messages import Request
from cluster.gateway.recording.observer import Observers, PoolMeter
from cluster.gateway.recording.request_log import LOGGER, RequestLog
from cluster.metrics import Registry
from cluster.usage import Usage
from deployments.request_log import close_request_log, open_request_log

STREAMS = 2000
_USAGE = Usage(prompt_tokens=16, cached_tokens=0, completion_tokens=TOKENS)
_REQUEST = Request("id", "POST", PATH, b"", [], b"{}")


def us_per_token(streams: int = STREAMS) -> float:
    """CPU microseconds for a token, with its share of what each stream takes once."""
    with _counters() as (meter, accounts):
        _count(meter, accounts, streams // 10)  # every series is there then
        begun = thread_time()
        _count(meter, accounts, streams)
        spent = thread_time() - begun
    counted = sum(meter.itl_s.counts) + sum(meter.ttft_s.counts)
    assert counted == (streams + streams // 10) * TOKENS
    return spent / (streams * TOKENS) * 1e6


def _count(meter: PoolMeter, accounts: TenantQuotas, streams: int) -> None:
    for _ in range(streams):
        watch = meter.watch(_REQUEST, PATH, accounts.enter(OPEN, MODEL, 144.0, 16.0))
        watch.placed("replica")
        watch.status = 200
        for _ in range(TOKENS):
            watch.writes.append(perf_counter())
        watch.end(_USAGE)


@contextmanager
def _counters() -> Iterator[tuple[PoolMeter, TenantQuotas]]:
    """A router's, with its configuration's defaults; nothing is written but the request log."""
    config = parse({"generators": [generator(0.0)]})
    registry = Registry()
    journal = RequestLog(config.router.log_requests_per_s)
    with tempfile.TemporaryDirectory(prefix="bench-metrics-") as folder:
        usage = UsageAccount(config, UsageLog(Path(folder) / "usage", config.accounting.keep_days))
        log = open_request_log(Path(folder), "benchmark")
        try:
            yield (
                PoolMeter(MODEL, Observers(registry, journal, usage=usage)),
                TenantQuotas(registry),
            )
        finally:
            close_request_log(log)
            logging.getLogger(LOGGER).setLevel(logging.NOTSET)
