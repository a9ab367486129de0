"""Chunks of an OpenAI stream; the constant parts are encoded only once."""

from abc import ABC, abstractmethod
from typing import Any

from cluster.engines.sim.generation import Delta, SimSequence
from cluster.engines.sim.parse import ChatBody, CompletionBody, StreamOptions
from cluster.engines.sim.wire import DONE, FINGERPRINT, count_tokens, dumps, event, usage


class ChunkWriter(ABC):
    """Encoder of one stream's chunks; subclasses define the place of the text."""

    object: str
    before_text: str
    plain_tail: bytes

    def __init__(self, id_: str, created: int, model: str, body: ChatBody | CompletionBody) -> None:
        self._base = {"id": id_, "object": self.object, "created": created, "model": model}
        options = body.stream_options or StreamOptions(include_usage=False)
        self._include_usage = bool(options.include_usage)
        self._continuous = self._include_usage and bool(options.continuous_usage_stats)
        self._with_ids = bool(body.return_token_ids)
        self._counts: dict[int, int] = {}
        self._prefix = b"data: " + dumps(self._base)[:-1] + b',"choices":[{"index":'
        self._heads: dict[int, bytes] = {}
        self._plain = not (self._continuous or self._with_ids)

    def first(self, sequence: SimSequence) -> bytes:
        return b""

    def token(self, delta: Delta) -> bytes:
        sequence, text, is_last = delta
        if self._plain and not is_last:
            head = self._heads.get(sequence.index) or self._head(sequence.index)
            return head + text.encode() + self.plain_tail
        return self._encode(sequence, text, is_last)

    def end(self, sequences: list[SimSequence]) -> list[bytes]:
        if not self._include_usage:
            return [DONE]
        closing = {"choices": [], "usage": usage(*count_tokens(sequences))}
        return [event(self._base | closing | {"system_fingerprint": FINGERPRINT}), DONE]

    @abstractmethod
    def choice(self, sequence: SimSequence, text: str, last: bool, ids: Any, first: bool) -> Any:
        """Return the chunk's choice with a token's text."""

    def usage(self, prompt: int, completion: int) -> dict[str, Any]:
        return usage(prompt, completion)

    def _head(self, index: int) -> bytes:
        head = self._prefix + str(index).encode() + self.before_text.encode()
        self._heads[index] = head
        return head

    def _encode(self, sequence: SimSequence, text: str, last: bool) -> bytes:
        request = sequence.request
        seen = self._counts[sequence.index] = self._counts.get(sequence.index, 0) + 1
        ids = [request.tokens[request.num_prompt + seen - 1]] if self._with_ids else None
        chunk = self._base | {"choices": [self.choice(sequence, text, last, ids, seen == 1)]}
        if last and not self._include_usage:
            chunk["system_fingerprint"] = FINGERPRINT
        if self._continuous:
            chunk["usage"] = self.usage(request.num_prompt, seen)
        return event(chunk)


class ChatChunks(ChunkWriter):
    """``/v1/chat/completions``."""

    object = "chat.completion.chunk"
    before_text = ',"delta":{"content":"'
    plain_tail = b'"},"logprobs":null,"finish_reason":null,"token_ids":null}]}\n\n'

    def first(self, sequence: SimSequence) -> bytes:
        request = sequence.request
        prompt = request.tokens[: request.num_prompt] if self._with_ids else None
        delta = {"role": "assistant", "content": ""}
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": None}
        chunk: dict[str, Any] = self._base | {"choices": [choice]}
        if self._continuous:
            chunk["usage"] = self.usage(request.num_prompt, 0)
        return event(chunk | {"prompt_token_ids": prompt, "prompt_text": None})

    def choice(self, sequence: SimSequence, text: str, last: bool, ids: Any, first: bool) -> Any:
        choice: dict[str, Any] = {"index": 0, "delta": {"content": text}, "logprobs": None}
        if not last:
            return choice | {"finish_reason": None, "token_ids": ids}
        reasons = {"finish_reason": sequence.request.finish_reason}
        return choice | reasons | {"stop_reason": sequence.stop_reason, "token_ids": ids}

    def usage(self, prompt: int, completion: int) -> dict[str, Any]:
        return usage(prompt, completion) | {"completion_tokens_details": None}


class CompletionChunks(ChunkWriter):
    """``/v1/completions``."""

    object = "text_completion"
    before_text = ',"text":"'
    plain_tail = (
        b'","logprobs":null,"finish_reason":null,"stop_reason":null,'
        b'"prompt_token_ids":null,"token_ids":null}]}\n\n'
    )

    def choice(self, sequence: SimSequence, text: str, last: bool, ids: Any, first: bool) -> Any:
        request = sequence.request
        return {
            "index": sequence.index,
            "text": text,
            "logprobs": None,
            "finish_reason": request.finish_reason if last else None,
            "stop_reason": sequence.stop_reason if last else None,
            "prompt_token_ids": request.tokens[: request.num_prompt] if ids and first else None,
            "token_ids": ids,
        }
