"""What a replica used since the last reading, from the best counters that the machine has."""

from collections.abc import Callable

from cluster.accounting import ESTIMATE
from cluster.accounting.counters import Grown, ProcessTree, Rapl, machine_busy_s
from cluster.accounting.ledger import Measured
from cluster.config.operations import AccountingConfig

Counter = Callable[[], float]


class Meter:
    """Reads a replica's joules; they are its GPUs', its share of the packages', or an estimate.

    RAPL counts whole packages, so a replica gets the share that its processes have of the
    machine's busy CPU time. What a GPU's and RAPL's counters say is added up.

    Args:
        watts_per_core: For an estimate where neither counter is there; None: no figure then.
        gpu_joules: A running sum over the replica's GPUs; None: it has none that counts.
        rapl_joules: A running sum of the machine's packages; None: not to be read.
        reason: Why there are no joules, where there are none (``accounting.REASONS``).
        own_cpu_s: A running sum of the replica's CPU time.
        machine_cpu_s: One of the machine's busy CPU time.
    """

    def __init__(
        self,
        *,
        watts_per_core: float | None,
        gpu_joules: Counter | None,
        rapl_joules: Counter | None,
        reason: str,
        own_cpu_s: Counter,
        machine_cpu_s: Counter,
    ) -> None:
        self._watts_per_core = watts_per_core
        self._gpu = gpu_joules and Grown(gpu_joules)
        self._rapl = rapl_joules and Grown(rapl_joules)
        self._reason = reason
        self._own = Grown(own_cpu_s)
        self._machine = Grown(machine_cpu_s)

    @property
    def counts(self) -> bool:
        """Whether there will be joules, be they an estimate."""
        return self.source != self._reason

    def read(self) -> Measured:
        """What was used since the last reading; blocks for some milliseconds."""
        own, machine = self._own(), self._machine()
        joules: float | None = None
        if self._gpu is not None or self._rapl is not None:
            joules = self._gpu() if self._gpu is not None else 0.0
            if self._rapl is not None:
                joules += self._rapl() * min(1.0, own / machine if machine else 0.0)
        elif self._watts_per_core is not None:
            joules = own * self._watts_per_core
        return Measured(joules, own, self.source)

    @property
    def source(self) -> str:
        """What measures the joules, or why there are none (``accounting.REASONS``)."""
        found = [name for name, counter in (("nvml", self._gpu), ("rapl", self._rapl)) if counter]
        if found:
            return "+".join(found)
        return self._reason if self._watts_per_core is None else ESTIMATE


def find_meter(
    config: AccountingConfig, gpu_joules: Counter | None, *, gpus_reserved: bool
) -> Meter:
    """The meter for this process and what it starts; ``gpu_joules`` as of ``Meter``."""
    rapl: Rapl | None = None
    reason = "nvml-unsupported" if gpus_reserved else "no-counter"
    if config.energy:
        try:
            rapl = Rapl()
        except PermissionError:
            reason = "rapl-unreadable"
        except (OSError, ValueError):
            pass
    tree = ProcessTree()
    return Meter(
        watts_per_core=config.watts_per_core if config.energy else None,
        gpu_joules=gpu_joules if config.energy else None,
        rapl_joules=rapl.joules if rapl is not None else None,
        reason=reason if config.energy else "",
        own_cpu_s=tree.cpu_s,
        machine_cpu_s=machine_busy_s,
    )
