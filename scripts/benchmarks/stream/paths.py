"""The paths that ``bench stream`` compares, by the names that its options and tables use."""

import sys
from collections.abc import Mapping, Sequence

from benchmarks.targets.bare import bare
from benchmarks.targets.running import Target
from benchmarks.targets.serve_handle import serve_default, serve_handle
from benchmarks.targets.tandem import tandem
from benchmarks.targets.vllm_router import installed, vllm_router

CLUSTER = "cluster"
BARE = "bare"
SERVE_HANDLE = "serve-handle"
SERVE_DEFAULT = "serve-default"
VLLM_ROUTER = "vllm-router"

TARGETS: Mapping[str, Target] = {
    CLUSTER: tandem,
    BARE: bare,
    SERVE_HANDLE: serve_handle,
    SERVE_DEFAULT: serve_default,
    VLLM_ROUTER: vllm_router,
}


def prepare(names: Sequence[str]) -> None:
    """Install what a target needs, so that nothing fails minutes later for want of it."""
    if VLLM_ROUTER in names:
        installed()


def say(number: int, name: str, found: str) -> None:
    """Show how far it is."""
    print(f"round {number + 1}: {name:<14} {found}", file=sys.stderr, flush=True)
