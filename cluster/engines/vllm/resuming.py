"""Resumption of answers in vLLM's engine: new requests whose first tokens another one generated.

The tokens arrive in the request's ``extra_args``. From there on, the request is like one that was
preempted: its output is computed again in one prefill, and all that depends on the output (length
limits, penalties, grammar, seed) goes on where it was. Model runner V2 derives its state from the
tokens; V1 has to be given them.

vLLM imports this module by name in the process of its engine (``scheduler_cls``) and in those of
its workers (``worker_extension_cls``).
"""

from typing import Any

from cluster.engines.vllm import internals
from cluster.engines.vllm.workers import DESCRIBE_WORKER, describe_worker

OUTPUT_IDS = "tandem_output_ids"
"""Key in a request's ``extra_args``: ids of the tokens that were generated already."""


class _Resuming:
    """Mixin for vLLM's schedulers."""

    def add_request(self, request: Any) -> None:
        ids = output_ids(request.sampling_params)
        if ids:
            # Not counted as a prefill of the prompt: cached tokens may exceed the prompt's.
            request.prefill_stats = None
            if not request.use_structured_output:
                request.append_output_token_ids(ids)
        super().add_request(request)  # type: ignore[misc]

    def _handle_blocked_waiting_request(self, request: Any) -> bool:
        waits_for_grammar = (
            request.status == internals.RequestStatus.WAITING_FOR_STRUCTURED_OUTPUT_GRAMMAR
        )
        is_ready: bool = super()._handle_blocked_waiting_request(request)  # type: ignore[misc]
        if is_ready and waits_for_grammar:
            manager = self.structured_output_manager  # type: ignore[attr-defined]
            # One by one, as they were generated: the tokens before decide about the next.
            for token_id in output_ids(request.sampling_params):
                request.append_output_token_ids(token_id)
                manager.accept_tokens(request, [token_id])
        return is_ready


def output_ids(sampling_params: Any) -> list[int]:
    """Return the ids of the tokens that were generated already; [] for most requests."""
    extra = sampling_params.extra_args if sampling_params is not None else None
    ids: list[int] = extra.get(OUTPUT_IDS, []) if extra else []
    return ids


def __getattr__(name: str) -> Any:
    # Created on access: the schedulers are imported in the engine's process only.
    if name == "ResumingScheduler":
        return type(name, (_Resuming, internals.Scheduler), {})
    if name == "ResumingAsyncScheduler":
        return type(name, (_Resuming, internals.AsyncScheduler), {})
    if name == "ResumingWorker":
        return _patch_worker()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _patch_worker() -> type:
    """Give model runner V1 the tokens that were generated already; return a mixin for workers."""
    runner = internals.gpu_model_runner

    class ResumedRequestState(runner.CachedRequestState):  # type: ignore[misc, name-defined]
        def __post_init__(self) -> None:
            super().__post_init__()
            if ids := output_ids(self.sampling_params):
                self.output_token_ids = list(ids)
                if self.generator is not None:
                    _advance(self.generator, len(ids))

    runner.CachedRequestState = ResumedRequestState
    return type("ResumingWorker", (), {DESCRIBE_WORKER: describe_worker})


def _advance(generator: Any, num_tokens: int) -> None:
    """Put a generator into the state that it has after sampling tokens on a CPU."""
    import torch

    if generator.device.type == "cpu":
        for _ in range(num_tokens):
            torch.randint(0, 2**31, (1,), generator=generator, dtype=torch.long)
