"""LoRA adapters of a running vLLM, added and removed as the pool's configuration changes."""

import asyncio
import logging
from collections.abc import Callable, Mapping
from typing import Any

from cluster.engines.vllm import internals
from cluster.link import Adapters

logger = logging.getLogger(__name__)

REMOVAL_DELAY_S = 5.0
"""Time for which requests for a removed adapter are still answered, in seconds: routers that do not
know yet send some. Requests that run go on in any case."""
_MAX_REASON_CHARS = 300


class LoraAdapters:
    """Adapters that one engine serves.

    Args:
        llm: vLLM's ``AsyncLLM``.
        models: vLLM's list of served models, with the adapters loaded at the start.
        paths: Configured path or id of each of these adapters, by name.
        resolve: Returns the directory of a configured path or id; may download it.
    """

    def __init__(
        self, llm: Any, models: Any, paths: Mapping[str, str], resolve: Callable[[str], str]
    ) -> None:
        self._llm = llm
        self._models = models
        self._resolve = resolve
        self.state = Adapters(dict(paths))
        """Adapters that are served, and those that could not be loaded."""

    async def apply(self, wanted: Mapping[str, str]) -> None:
        """Load new adapters, and those with another path; remove those that are not wanted.

        An adapter that cannot be loaded changes nothing, and is in ``state.failed``.
        """
        loaded, failed = dict(self.state.loaded), {}
        for name in loaded.keys() - wanted.keys():
            del loaded[name]
            self._remove_later(name)
        for name, path in wanted.items():
            if loaded.get(name) == path:
                continue
            try:
                await self._load(name, path)
                loaded[name] = path
                logger.info("loaded the adapter %s from %s", name, path)
            except Exception as error:  # of any kind: vLLM reads the files in another process
                failed[name] = _reason(error)
                logger.warning("cannot load the adapter %s: %s", name, failed[name])
        self.state = Adapters(loaded, failed)

    async def _load(self, name: str, path: str) -> None:
        directory = await asyncio.to_thread(self._resolve, path)
        # Another id than that of an earlier adapter of this name, whose requests may still run.
        request = internals.LoRARequest(name, self._models.lora_id_counter.inc(1), directory)
        await self._llm.add_lora(request)
        self._models.lora_requests[name] = request

    def _remove_later(self, name: str) -> None:
        requests = self._models.lora_requests
        removed = requests.get(name)

        def remove() -> None:
            if requests.get(name) is removed:  # not added again
                requests.pop(name, None)

        asyncio.get_running_loop().call_later(REMOVAL_DELAY_S, remove)
        logger.info("removed the adapter %s", name)


def _reason(error: Exception) -> str:
    # vLLM's engine process sends the message of its error, with the class in front.
    text = " ".join(str(error).split()) or type(error).__name__
    return text[:_MAX_REASON_CHARS]
