"""Times and random ids in vLLM's answers, the same in every replica that gives an answer.

vLLM's serving layer reads the clock for ``created`` and draws ids for tool calls and items. Its
modules get stand-ins that ask the progress of the current request first.
"""

import sys
import time
import uuid
from typing import Any

from cluster.engines.vllm.requests import current_progress

_PREFIXES = (
    "vllm.entrypoints.anthropic.",
    "vllm.entrypoints.openai.",
    "vllm.parser.",
    "vllm.renderers.",
    "vllm.tool_parsers.",
)


def pin_times_and_ids() -> None:
    """Replace clocks and ids in vLLM's loaded modules; call this once they are all imported."""
    stand_ins = {
        "time": (time, _Clock()),
        "uuid": (uuid, _Uuids()),
        "random_uuid": (sys.modules["vllm.utils"].random_uuid, _random_uuid),
    }
    modules = [each for name, each in sys.modules.items() if name.startswith(_PREFIXES)]
    for module in modules:
        for name, (original, stand_in) in stand_ins.items():
            if vars(module).get(name) is original:
                setattr(module, name, stand_in)


class _Clock:
    """The module ``time``, whose ``time`` is that of the answer's beginning."""

    def time(self) -> float:
        progress = current_progress()
        return time.time() if progress is None else progress.time_s

    def __getattr__(self, name: str) -> Any:
        return getattr(time, name)


class _Uuids:
    """The module ``uuid``, whose ``uuid4`` depends on the answer."""

    def uuid4(self) -> Any:
        progress = current_progress()
        if progress is None:
            return uuid.uuid4()
        return uuid.UUID(hex=progress.random_uuid() + progress.random_uuid())

    def __getattr__(self, name: str) -> Any:
        return getattr(uuid, name)


def _random_uuid() -> str:
    progress = current_progress()
    return f"{uuid.uuid4().int >> 64:016x}" if progress is None else progress.random_uuid()
