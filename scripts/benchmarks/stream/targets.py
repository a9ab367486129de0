"""Servers that ``bench stream`` compares, by the names in its options and tables."""

from collections.abc import Mapping, Sequence

from benchmarks.targets.bare import bare
from benchmarks.targets.running import SimTarget
from benchmarks.targets.serve_handle import serve_default, serve_handle
from benchmarks.targets.tandem import tandem, tandem_without_handover
from benchmarks.targets.vllm import install_vllm_router, vllm_router

CLUSTER = "cluster"
NO_HANDOVER = "no-handover"
BARE = "bare"
SERVE_HANDLE = "serve-handle"
SERVE_DEFAULT = "serve-default"
VLLM_ROUTER = "vllm-router"

TARGETS: Mapping[str, SimTarget] = {
    CLUSTER: tandem,
    NO_HANDOVER: tandem_without_handover,
    BARE: bare,
    SERVE_HANDLE: serve_handle,
    SERVE_DEFAULT: serve_default,
    VLLM_ROUTER: vllm_router,
}


def prepare(names: Sequence[str]) -> None:
    """Install missing peers, so that a failed installation shows before the first measurement."""
    if VLLM_ROUTER in names:
        install_vllm_router()
