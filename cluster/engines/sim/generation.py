"""Sequences of one HTTP request, and the queue that carries their tokens to its coroutine.

The scheduler's step adds tokens; the request's coroutine waits for them.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence

from cluster.engines.sim import tokenizer
from cluster.engines.sim.scheduler import SimRequest
from cluster.usage import UsageCounter

# vLLM's messages
DEAD = "EngineCore encountered an issue. See stack trace (above) for the root cause."
FAILED = "Internal server error"

_WORDS = [tokenizer.piece_of(token) for token in tokenizer.WORD_IDS]


class GenerationError(Exception):
    """A generation failed, or the engine died."""


class SimSequence:
    """One prompt and its completion."""

    __slots__ = ("_generation", "_left", "_pending", "_state", "index", "request", "stop_reason")

    def __init__(
        self, generation: "Generation", index: int, request: SimRequest, state: int
    ) -> None:
        self._generation = generation
        self.index = index
        self.request = request
        self.stop_reason: str | None = None
        self._state = state
        self._left = request.max_tokens
        self._pending = ""  # text withheld because it may start a stop string
        request.sample = self.sample

    def sample(self) -> int:
        word, self._state = tokenizer.next_word(self._state)
        self._left -= 1
        text = _WORDS[word]
        if self._generation.stop:
            text = self._cut_at_stop(text)
        is_last = not self._left or self.request.stopped
        self._generation.post((self, text, is_last))
        return tokenizer.WORD_IDS[word]

    def _cut_at_stop(self, text: str) -> str:
        """Return the text to show; as in vLLM, text that may start a stop string is withheld."""
        text = self._pending + text
        found = [(at, stop) for stop in self._generation.stop if (at := text.find(stop)) >= 0]
        if found:
            at, self.stop_reason = min(found)
            self.request.stopped = True
            return text[:at]
        withheld = max(map(len, self._generation.stop)) - 1 if self._left else 0
        shown = max(0, len(text) - withheld)
        self._pending = text[shown:]
        return text[:shown]


Delta = tuple[SimSequence, str, bool]
"""Next token of a sequence: its text, and True if it is the last."""


class Generation:
    """Sequences of one HTTP request; counts its usage.

    Args:
        prompts: Token ids of each prompt.
        max_tokens: Limit of each completion.
        stop: Stop strings.
        usage: Usage of the request.
        seed: Seed of the generated text.
        fails: Fail instead of generating.
        adapter: LoRA adapter.
        earlier: Indices of the sequences whose tokens an earlier replica passed on, in order.
        record: Called with the index of a sequence before its next token is passed on.
    """

    __slots__ = (
        *("_deltas", "_error", "_num_earlier", "_record", "_usage", "_waiter", "fails"),
        *("sequences", "stop"),
    )

    def __init__(
        self,
        prompts: Sequence[list[int]],
        max_tokens: Sequence[int],
        stop: Sequence[str],
        *,
        usage: UsageCounter,
        seed: int,
        fails: bool,
        adapter: str = "",
        earlier: Sequence[int] = (),
        record: Callable[[int], None] = lambda _: None,
    ) -> None:
        self.stop = tuple(stop)
        self.fails = fails
        self.sequences = [
            SimSequence(
                self,
                index,
                SimRequest(prompt, limit, int, adapter=adapter),
                tokenizer.digest(prompt, seed),
            )
            for index, (prompt, limit) in enumerate(zip(prompts, max_tokens, strict=True))
        ]
        self._usage = usage
        usage.prompt_tokens = sum(map(len, prompts))
        self._deltas: list[Delta] = []
        self._error: str | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._record = record
        self._num_earlier = len(earlier)
        for index in earlier:
            self._repeat(self.sequences[index].request)

    def post(self, delta: Delta) -> None:
        if self.fails:
            delta[0].request.stopped = True
            self._error = FAILED
        else:
            self._deltas.append(delta)
            self._usage.completion_tokens += 1
            if delta[2]:
                self._usage.cached_tokens += delta[0].request.cached_tokens
        self._wake()

    def fail(self, message: str) -> None:
        self._error = message
        self._wake()

    def count_times(self) -> None:
        for sequence in self.sequences:
            request = sequence.request
            if request.first_token_s is not None and request.finished_s is not None:
                ttft_s = request.first_token_s - request.arrived_s
                decode_s = request.finished_s - request.first_token_s
                self._usage.add_times(ttft_s, decode_s, request.num_generated)

    async def wait_for_tokens(self) -> None:
        """Wait for the next tokens.

        Raises:
            GenerationError: There will be no more tokens.
        """
        while not self._deltas:
            if self._error is not None:
                raise GenerationError(self._error)
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter

    async def batches(self) -> AsyncIterator[list[Delta]]:
        """Yield the tokens in batches, as they come, until all sequences have ended.

        Raises:
            GenerationError: See ``wait_for_tokens``.
        """
        num_open = len(self.sequences)
        while num_open:
            await self.wait_for_tokens()
            deltas, self._deltas = self._deltas, []
            for delta in deltas:
                num_open -= delta[2]
                if self._num_earlier:
                    self._num_earlier -= 1
                else:
                    self._record(delta[0].index)
            yield deltas

    @staticmethod
    def _repeat(request: SimRequest) -> None:
        """Generate a token again that an earlier replica passed on."""
        request.num_prompt = request.num_prompt or len(request.tokens)
        request.tokens.append(request.sample())
        if request.stopped or request.num_generated >= request.max_tokens:
            request.finished_s = request.arrived_s

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)
