"""Hand-over of running answers: a replica continues where another one was lost.

``AsyncLLM.generate`` is wrapped. It records its outputs in the request's journal. If the journal of
another replica came with the request, it first yields those outputs again. They pass vLLM's output
processor as if the engine had just produced them, so that its detokenizer and stop strings are in
the same state. Then the engine goes on: it gets the tokens as output that it has generated already
(``resuming``), which is how vLLM itself resumes a preempted request.
"""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import aclosing
from contextvars import ContextVar
from copy import copy
from functools import wraps
from typing import Any

from cluster.engines.vllm import internals
from cluster.engines.vllm.journal import Completion, LogprobRow, Output
from cluster.engines.vllm.progress import Progress
from cluster.engines.vllm.requests import Generate, current_progress
from cluster.engines.vllm.resuming import OUTPUT_IDS
from cluster.errors import HandoverError

_REPLAYED_PER_TURN = 16  # outputs, 2 ms: other streams and the link's heartbeat go on meanwhile
_replayed_call: ContextVar["_ReplayedCall | None"] = ContextVar("replayed_call", default=None)


def hand_over_answers(llm: Any) -> None:
    """Make the answers of an ``AsyncLLM`` resumable; ``resuming`` must run in its engine."""
    llm.generate = _resumable(llm.generate, llm)
    llm.engine_core.add_request_async = _held(llm.engine_core.add_request_async)


def _resumable(generate: Generate, llm: Any) -> Generate:
    @wraps(generate)
    async def wrapper(prompt: Any, sampling_params: Any, *args: Any, **kwargs: Any) -> Any:
        if sampling_params.extra_args:  # set by clients, too (``vllm_xargs``)
            sampling_params.extra_args.pop(OUTPUT_IDS, None)
        progress = current_progress()
        outputs = generate(prompt, sampling_params, *args, **kwargs)
        async with aclosing(outputs):
            if progress is None:
                async for output in outputs:
                    yield output
                return
            number = progress.next_call()
            is_new = not progress.has_earlier(number)
            if not is_new:
                call = _ReplayedCall(llm, sampling_params.n, progress, number)
                async for output in call.replay(outputs):
                    yield output
            async for output in progress.record(number, outputs, is_new=is_new):
                yield output

    return wrapper


def _held(add_request: Any) -> Any:
    @wraps(add_request)
    async def wrapper(request: Any) -> None:
        call = _replayed_call.get()
        if call is None:
            await add_request(request)
        else:
            await call.hold(request, add_request)

    return wrapper


class _ReplayedCall:
    """A call of ``generate`` whose first outputs come from an earlier replica.

    Holds the call's requests, one for each sequence, until these outputs have passed.
    """

    def __init__(self, llm: Any, num_sequences: int, progress: Progress, number: int) -> None:
        self._outputs = llm.output_processor
        self._max_model_len = llm.model_config.max_model_len
        self._num_sequences = num_sequences
        self._progress = progress
        self._number = number
        self._requests: list[Any] = []
        self._add_request: Any = None
        self._token_ids: list[list[int]] = [[] for _ in range(num_sequences)]

    async def hold(self, request: Any, add_request: Any) -> None:
        """Keep a request of the call; the last one lets the first earlier output pass."""
        self._requests.append(request)
        self._add_request = add_request
        if len(self._requests) == self._num_sequences:
            self._pass_on(await self._progress.replay(self._number))

    async def replay(self, outputs: AsyncIterator[Any]) -> AsyncIterator[Any]:
        """Yield the earlier outputs, then give the unfinished requests to the engine."""
        num_replayed = 0
        while self._progress.has_earlier(self._number):
            num_replayed += 1
            if num_replayed % _REPLAYED_PER_TURN == 0:
                await asyncio.sleep(0)
            if self._requests:
                self._pass_on(await self._progress.replay(self._number))
                output = await anext(outputs)
            else:
                output = await self._start(outputs)
            try:
                yield output
            finally:
                self._progress.end_turn()
        for request, token_ids in zip(self._requests, self._token_ids, strict=True):
            if request.request_id in self._outputs.request_states:
                if len(request.prompt_token_ids or ()) + len(token_ids) >= self._max_model_len:
                    raise HandoverError("The answer exceeds this replica's context.")
                await self._add_request(_with_output_ids(request, token_ids))

    async def _start(self, outputs: AsyncIterator[Any]) -> Any:
        token = _replayed_call.set(self)
        try:
            return await anext(outputs)
        finally:
            _replayed_call.reset(token)

    def _pass_on(self, output: Output) -> None:
        """Put an earlier output where the engine's outputs arrive.

        Raises:
            HandoverError: The output does not fit the request.
        """
        states = [self._prepare_state(each, output) for each in output.completions]
        processor = self._outputs
        processor.process_outputs(
            [
                _core_output(state.request_id, completion)
                for state, completion in zip(states, output.completions, strict=True)
            ],
            time.monotonic(),
            # Statistics of tokens that another engine generated; they are dropped.
            internals.IterationStats() if processor.log_stats else None,
        )
        if states[0].queue.output is None:  # nothing would wake the call
            raise HandoverError("The journal of the answer does not fit the request; try again.")

    def _prepare_state(self, completion: Completion, output: Output) -> Any:
        index = completion.index
        request = self._requests[index] if index < self._num_sequences else None
        state = request and self._outputs.request_states.get(request.request_id)
        if state is None:
            raise HandoverError("The journal of the answer does not fit the request; try again.")
        self._token_ids[index] += completion.token_ids
        if output.cached_tokens or output.cache_creation_tokens:
            state.num_cached_tokens = output.cached_tokens
            state.num_cache_creation_tokens = output.cache_creation_tokens
        processor = state.logprobs_processor
        if output.prompt_logprobs is not None and processor.prompt_logprobs is not None:
            # It has the first position already, which has no logprobs.
            for row in output.prompt_logprobs[len(processor.prompt_logprobs) :]:
                processor.prompt_logprobs.append(_position(row))
        if completion.logprobs is not None and processor.logprobs is not None:
            for row in completion.logprobs:
                processor.logprobs.append(_position(row))
                processor.cumulative_logprob += row[0][1] if row else 0.0
        return state


def _core_output(request_id: str, completion: Completion) -> Any:
    finish_reason = None
    # A stop string is found by the output processor, in the text.
    found_in_text = completion.finish_reason == "stop" and isinstance(completion.stop_reason, str)
    if completion.finish_reason is not None and not found_in_text:
        finish_reason = internals.FinishReason[completion.finish_reason.upper()]
    return internals.EngineCoreOutput(
        request_id=request_id,
        new_token_ids=list(completion.token_ids),
        finish_reason=finish_reason,
        stop_reason=completion.stop_reason if finish_reason is not None else None,
    )


def _position(row: LogprobRow | None) -> Any:
    if row is None:
        return None
    return {id_: internals.Logprob(logprob, rank, text) for id_, logprob, rank, text in row}


def _with_output_ids(request: Any, token_ids: list[int]) -> Any:
    """Return a request of the engine that has generated these tokens already."""
    if not token_ids:
        return request
    params = copy(request.sampling_params)
    params.extra_args = {**(params.extra_args or {}), OUTPUT_IDS: token_ids}
    params.prompt_logprobs = None  # passed on already
    request = copy(request)
    request.sampling_params = params
    return request
