"""Number of clients of each kind that put a cluster under load, and the size of their requests."""

from collections.abc import Mapping
from dataclasses import dataclass

from resilience.testbed import NUM_REPLICAS


@dataclass(frozen=True, slots=True)
class Mix:
    """Number of clients of each kind, and the size of their requests."""

    greedy: int = 64
    sampled: int = 4
    classify: int = 2
    slow: int = 1
    job: int = 1
    max_tokens: int = 40
    slow_prompts: int = 8
    """Prompts of the slow reader's request, whose answer must not fit into the buffers."""

    def clients(self) -> list[str]:
        """Return the names of all HTTP clients."""
        kinds = ("greedy", "sampled", "classify", "slow")
        return [f"{kind}-{number}" for kind in kinds for number in range(getattr(self, kind))]


MIXES: Mapping[str, Mix] = {
    "sim": Mix(),
    # A step of 64 sequences takes about 0.5 s on two cores.
    "vllm": Mix(sampled=2, max_tokens=24, slow_prompts=2),
    "vllm-tiny": Mix(sampled=2, max_tokens=120, slow_prompts=2),
}
"""Load by engine."""
SHARED_CORES = Mix(greedy=16, sampled=2, max_tokens=24, slow_prompts=2)
"""Load of ranks that share cores."""


def choose_mix(engine: str, tensor_parallel: int, num_cores: int) -> Mix:
    """Return the load of a chaos run.

    A rank waits for the others in a loop, so that ranks without cores of their own take those of
    the ranks that they wait for, several times per step.
    """
    has_own_cores = tensor_parallel * NUM_REPLICAS <= num_cores
    return MIXES[engine] if tensor_parallel == 1 or has_own_cores else SHARED_CORES
