"""Energy and CPU time of a replica, from the best counters of the machine."""

from collections.abc import Callable, Sequence

from cluster.accounting import ESTIMATE
from cluster.accounting.counters import Increase, ProcessTree, Rapl, machine_busy_s
from cluster.accounting.ledger import Measurement
from cluster.config.operations import AccountingConfig

RunningSum = Callable[[], float]


class Meter:
    """Meter of a replica's joules: GPU energy plus a share of RAPL's, or an estimate.

    RAPL counts whole CPU packages. A replica's share is that of its processes in the machine's
    busy CPU time. Without a counter, joules are estimated from ``watts_per_core``; without that,
    ``reason`` (``accounting.REASONS``) is reported.
    """

    def __init__(
        self,
        *,
        watts_per_core: float | None,
        gpu_joules: RunningSum | None,
        rapl_joules: RunningSum | None,
        reason: str,
        own_cpu_s: RunningSum,
        machine_cpu_s: RunningSum,
    ) -> None:
        self._watts_per_core = watts_per_core
        self._gpu = gpu_joules and Increase(gpu_joules)
        self._rapl = rapl_joules and Increase(rapl_joules)
        self._reason = reason
        self._own = Increase(own_cpu_s)
        self._machine = Increase(machine_cpu_s)

    @property
    def has_joules(self) -> bool:
        """True if there are joules, measured or estimated."""
        return self.source != self._reason

    def read(self) -> Measurement:
        """Return the energy and CPU time since the last call; blocks for some milliseconds."""
        own, machine = self._own(), self._machine()
        joules: float | None = None
        if self._gpu is not None or self._rapl is not None:
            joules = self._gpu() if self._gpu is not None else 0.0
            if self._rapl is not None:
                joules += self._rapl() * min(1.0, own / machine if machine else 0.0)
        elif self._watts_per_core is not None:
            joules = own * self._watts_per_core
        return Measurement(joules, own, self.source)

    @property
    def source(self) -> str:
        """Source of the joules, or the reason why there are none (``accounting.REASONS``)."""
        found = [name for name, counter in (("nvml", self._gpu), ("rapl", self._rapl)) if counter]
        if found:
            return "+".join(found)
        return self._reason if self._watts_per_core is None else ESTIMATE


def find_meter(
    config: AccountingConfig,
    gpu_joules: RunningSum | None,
    *,
    gpus_reserved: bool,
    workers: Sequence[int] = (),
) -> Meter:
    """Return the meter for this process, its descendants and workers that others started.

    See ``Meter`` for ``gpu_joules``.
    """
    rapl: Rapl | None = None
    reason = "nvml-unsupported" if gpus_reserved else "no-counter"
    if config.energy:
        try:
            rapl = Rapl()
        except PermissionError:
            reason = "rapl-unreadable"
        except (OSError, ValueError):
            pass
    tree = ProcessTree(workers)
    return Meter(
        watts_per_core=config.watts_per_core if config.energy else None,
        gpu_joules=gpu_joules if config.energy else None,
        rapl_joules=rapl.joules if rapl is not None else None,
        reason=reason if config.energy else "",
        own_cpu_s=tree.cpu_s,
        machine_cpu_s=machine_busy_s,
    )
