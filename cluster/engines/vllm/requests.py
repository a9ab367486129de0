"""Usage and prompts of each HTTP request, observed where vLLM generates its tokens.

A context variable links a request to its calls of ``AsyncLLM.generate``: vLLM calls it in the task
that runs the application, or in a task started from there.
"""

from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from contextlib import aclosing
from contextvars import ContextVar
from functools import wraps
from typing import Any

from cluster.asgi import ASGIApp, Message, Receive, Scope, Send, journal_of, usage_of
from cluster.engines.prefix_cache import PrefixTracker
from cluster.engines.vllm.bursts import Arrivals
from cluster.engines.vllm.progress import Progress
from cluster.routing.fingerprint import PROMPT_PATHS, Fingerprint, fingerprint
from cluster.usage import UsageCounter

Generate = Callable[..., AsyncGenerator[Any, None]]
"""``AsyncLLM.generate``; each ``RequestOutput`` it yields holds the new tokens only."""

Abort = Callable[..., Awaitable[None]]
AddRequest = Callable[[Any], Awaitable[None]]


class HttpRequest:
    """One HTTP request: its usage, and the part of its body received so far."""

    def __init__(self, scope: Scope, receive: Receive, arrivals: Arrivals) -> None:
        self.usage = usage_of(scope)
        self._path = scope["path"]
        self.arrival = arrivals.begin() if self._path in PROMPT_PATHS else None
        self._receive = receive
        self._pieces: list[bytes] | None = [] if self._path in PROMPT_PATHS else None
        self._journal = journal_of(scope)
        self._progress: Progress | None = None

    @property
    def progress(self) -> Progress | None:
        """Progress of the answer; None if it stays here. Valid once the body was received."""
        if self._progress is None and self._journal is not None:
            self._progress = Progress(self._journal)
        return self._progress

    def end_arrival(self) -> None:
        """Note that the engine gets the request, or that it ended before; see ``Arrivals``."""
        if self.arrival is not None:
            self.arrival.end()

    async def receive(self) -> Message:
        message = await self._receive()
        if self._pieces is not None and message["type"] == "http.request":
            self._pieces.append(message.get("body", b""))
        return message

    def pop_fingerprint(self) -> Fingerprint | None:
        """Return the fingerprint on the first call only: it describes the first prompt."""
        if self._pieces is None:
            return None
        body, self._pieces = b"".join(self._pieces), None
        return fingerprint(self._path, body)


_request: ContextVar[HttpRequest | None] = ContextVar("request", default=None)


def current_progress() -> Progress | None:
    """Return the progress of the current request's answer; None if it is not handed over."""
    request = _request.get()
    return None if request is None else request.progress


def add_prompt_tokens(num_tokens: int) -> None:
    """Add tokens to the usage of the current request, such as those of a recording."""
    request = _request.get()
    if request is not None:
        request.usage.prompt_tokens += num_tokens


class TrackRequest:
    """Middleware that makes the request known to ``count_usage`` and ``observe_prompts``."""

    def __init__(self, app: ASGIApp, arrivals: Arrivals) -> None:
        self._app = app
        self._arrivals = arrivals

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = HttpRequest(scope, receive, self._arrivals)
        _request.set(request)
        try:
            await self._app(scope, request.receive, send)
        finally:
            request.end_arrival()


def note_arrivals(add_request: AddRequest) -> AddRequest:
    """Wrap ``add_request_async`` of vLLM's client of the engine: the request has arrived then."""

    @wraps(add_request)
    async def wrapper(engine_request: Any) -> None:
        request = _request.get()
        if request is not None:
            request.end_arrival()  # before the engine could see its own request as arriving
        await add_request(engine_request)

    return wrapper


def count_usage(generate: Generate) -> Generate:
    """Wrap ``generate`` to add its tokens to the usage of the current request."""

    @wraps(generate)
    async def wrapper(*args: Any, **kwargs: Any) -> AsyncGenerator[Any, None]:
        request = _request.get()
        usage = UsageCounter() if request is None else request.usage
        async with aclosing(generate(*args, **kwargs)) as outputs:
            first, output = True, None
            async for output in outputs:
                if first:
                    first = False
                    usage.prompt_tokens += len(output.prompt_token_ids or ())
                    usage.cached_tokens += output.num_cached_tokens or 0
                for completion in output.outputs:
                    usage.completion_tokens += len(completion.token_ids)
                yield output
            times = getattr(output, "metrics", None)  # of the last sequence; None if disabled
            if times is not None and times.num_generation_tokens:
                decode_s = times.last_token_ts - times.first_token_ts
                usage.add_times(times.first_token_latency, decode_s, times.num_generation_tokens)

    return wrapper


def count_prompts(encode: Generate) -> Generate:
    """Wrap ``encode``, the pooling form of ``generate``, to count the tokens of its prompts."""

    @wraps(encode)
    async def wrapper(*args: Any, **kwargs: Any) -> AsyncGenerator[Any, None]:
        request = _request.get()
        usage = UsageCounter() if request is None else request.usage
        async with aclosing(encode(*args, **kwargs)) as outputs:
            async for output in outputs:
                if output.finished:
                    usage.prompt_tokens += len(output.prompt_token_ids or ())
                    usage.cached_tokens += output.num_cached_tokens or 0
                yield output

    return wrapper


def count_aborted(abort: Abort, states: Mapping[str, Any], parents: Mapping[str, Any]) -> Abort:
    """Wrap ``AsyncLLM.abort`` to count the tokens of responses that are not streamed.

    ``generate`` yields such a response only at its end, and calls ``abort`` if it is cancelled.

    Args:
        abort: The method.
        states: vLLM's ``RequestState`` of each sequence, by internal id.
        parents: vLLM's ``ParentRequest`` of each prompt with several sequences, by internal id.
    """

    @wraps(abort)
    async def wrapper(request_id: Any, internal: bool = False) -> None:
        request = _request.get()
        if request is not None and internal and isinstance(request_id, str):
            parent = parents.get(request_id)
            ids = [request_id] if parent is None else parent.child_requests
            _count_unreported([states[id_] for id_ in ids if id_ in states], request.usage)
        await abort(request_id, internal)

    return wrapper


def _count_unreported(sequences: Sequence[Any], usage: UsageCounter) -> None:
    unreported = [
        state
        for state in sequences
        if state.output_kind.name == "FINAL_ONLY"
        and state.detokenizer is not None
        and not state.is_prefilling
    ]
    if unreported:  # all sequences have the same prompt
        usage.prompt_tokens += unreported[0].prompt_len
        usage.cached_tokens += unreported[0].num_cached_tokens
        usage.completion_tokens += sum(s.detokenizer.num_output_tokens() for s in unreported)


def observe_prompts(generate: Generate, tracker: PrefixTracker) -> Generate:
    """Wrap ``generate`` to add each request's first prompt to ``tracker``."""

    @wraps(generate)
    async def wrapper(prompt: Any, *args: Any, **kwargs: Any) -> AsyncGenerator[Any, None]:
        request = _request.get()
        if request is not None and (text := request.pop_fingerprint()) is not None:
            fields = prompt if isinstance(prompt, dict) else {}
            token_ids = fields.get("prompt_token_ids")
            lora = kwargs.get("lora_request")
            if token_ids and not fields.get("cache_salt"):  # salted blocks are not shared
                tracker.add_prompt(text, token_ids, lora.lora_name if lora is not None else "")
        async with aclosing(generate(prompt, *args, **kwargs)) as outputs:
            async for output in outputs:
                yield output

    return wrapper
