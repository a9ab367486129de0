"""vLLM without a model: all of vLLM's frontend, on an engine core that follows a script.

Everything that a client can observe is real: chat templates, parsers, detokenizer, stop strings,
aborts and HTTP handlers. Only the process with the model is replaced.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

from cluster.config import GeneratorConfig
from cluster.engines.vllm.engine import VllmEngine
from cluster.models import store

MODEL = "scripted"

Script = Callable[[Any], str | Sequence[int]]
"""From vLLM's ``EngineCoreRequest`` to the text or the token ids of the answer."""


class ScriptedCore:
    """Stand-in for vLLM's ``AsyncMPClient``: each step yields one token of each request.

    An answer ends with the end-of-sequence token, or at ``max_tokens``.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.script: Script = lambda request: ""
        self.step_s = 0.0
        """Pause before each step, in seconds."""
        self.requests: list[Any] = []
        """All requests received, vLLM's ``EngineCoreRequest``."""
        self.aborted: list[str] = []
        self.engine_ranks_managed = [0]
        self.resources = SimpleNamespace(engine_dead=False, ctx=mock.Mock())
        self._tokenizer = tokenizer
        self._remaining: dict[str, list[int]] = {}
        self._added = asyncio.Event()

    def prompt_of(self, request: Any) -> str:
        return str(self._tokenizer.decode(request.prompt_token_ids))

    async def get_supported_tasks_async(self) -> tuple[str, ...]:
        return ("generate",)

    async def add_request_async(self, request: Any) -> None:
        self.requests.append(request)
        answer = self.script(request)
        if isinstance(answer, str):
            answer = self._tokenizer.encode(answer, add_special_tokens=False)
        ids = [*answer, self._tokenizer.eos_token_id][: request.sampling_params.max_tokens]
        self._remaining[request.request_id] = ids
        self._added.set()

    async def abort_requests_async(self, request_ids: Iterable[str]) -> None:
        for request_id in request_ids:
            if self._remaining.pop(request_id, None) is not None:
                self.aborted.append(request_id)

    async def get_output_async(self) -> Any:
        from vllm.v1.engine import EngineCoreOutputs

        while not self._remaining:
            self._added.clear()
            await self._added.wait()
        await asyncio.sleep(self.step_s)
        return EngineCoreOutputs(outputs=[self._next_output(id_) for id_ in [*self._remaining]])

    def shutdown(self, timeout: float | None = None) -> None:
        self._remaining.clear()

    def _next_output(self, request_id: str) -> Any:
        from vllm.v1.engine import EngineCoreOutput, FinishReason

        token = self._remaining[request_id].pop(0)
        reason = None
        if not self._remaining[request_id]:
            del self._remaining[request_id]
            is_end = token == self._tokenizer.eos_token_id
            reason = FinishReason.STOP if is_end else FinishReason.LENGTH
        return EngineCoreOutput(request_id, [token], finish_reason=reason)


def write_model(
    directory: Path, chat_template: str | None = None, tokens: Sequence[str] = ()
) -> None:
    """Write a model without weights: SmolLM2's tokenizer with more ``tokens``, a tiny Llama."""
    from transformers import AutoTokenizer, LlamaConfig

    tokenizer = AutoTokenizer.from_pretrained(store.resolve("smollm2-135m-instruct"))
    tokenizer.add_tokens(list(tokens))
    if chat_template is not None:
        tokenizer.chat_template = chat_template
    tokenizer.save_pretrained(directory)
    LlamaConfig(
        architectures=["LlamaForCausalLM"],
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=1,
        num_attention_heads=1,
        max_position_embeddings=2048,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    ).save_pretrained(directory)


@asynccontextmanager
async def scripted_engine(
    directory: Path | str, **fields: Any
) -> AsyncIterator[tuple[VllmEngine, ScriptedCore]]:
    """Start the engine of a generator pool with the configuration ``fields``, without a model."""
    cores: list[ScriptedCore] = []

    def make_core(*args: Any, renderer: Any, **kwargs: Any) -> ScriptedCore:
        cores.append(ScriptedCore(renderer.tokenizer))
        return cores[-1]

    config = {"name": MODEL, "model": str(directory), "kv_cache_memory_bytes": "64MiB", **fields}
    engine = VllmEngine(GeneratorConfig.model_validate(config), str(directory))
    target = "vllm.v1.engine.core_client.EngineCoreClient.make_async_mp_client"
    with mock.patch(target, make_core):
        await engine.start()
    try:
        yield engine, cores[0]
    finally:
        await engine.stop()
