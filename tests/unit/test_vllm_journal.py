"""Journals of vLLM's answers."""

from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.engines.vllm import journal as j
from cluster.errors import HandoverError

tokens = st.integers(0, 2**32 - 1)
rows = st.none() | st.lists(st.tuples(tokens, st.floats(-50, 0), st.none() | tokens, st.text()))
completions = st.builds(
    j.Completion,
    index=st.integers(0, 9),
    token_ids=st.lists(tokens),
    finish_reason=st.none() | st.sampled_from(["stop", "length"]),
    stop_reason=st.none() | st.text() | tokens,
    logprobs=st.none() | st.lists(rows, min_size=1),
)
outputs = st.builds(
    j.Output,
    call=st.integers(0, 3),
    completions=st.lists(completions, min_size=1, max_size=3),
    cached_tokens=st.integers(0, 100),
    cache_creation_tokens=st.integers(0, 100),
    prompt_logprobs=st.none() | st.lists(rows, min_size=1),
)


def as_vllm(output: j.Output) -> Any:
    """Return the output as an object like vLLM's ``RequestOutput``."""

    def positions(given: list[Any] | None) -> Any:
        if given is None:
            return None
        return [
            None
            if row is None
            else {
                id_: SimpleNamespace(logprob=logprob, rank=rank, decoded_token=text)
                for id_, logprob, rank, text in row
            }
            for row in given
        ]

    return SimpleNamespace(
        num_cached_tokens=output.cached_tokens,
        num_cache_creation_tokens=output.cache_creation_tokens,
        prompt_logprobs=positions(output.prompt_logprobs),
        outputs=[
            SimpleNamespace(
                index=each.index,
                token_ids=each.token_ids,
                finish_reason=each.finish_reason,
                stop_reason=each.stop_reason,
                logprobs=positions(each.logprobs),
            )
            for each in output.completions
        ],
    )


@given(st.lists(outputs, max_size=5))
def test_outputs_round_trip(given_outputs: list[j.Output]) -> None:
    start = j.Start(1.5, 7)
    data = j.encode_start(start)
    for output in given_outputs:
        data += j.encode_output(output.call, as_vllm(output), is_first=True)
    found_start, found = j.decode(data)
    assert found_start == start
    assert [as_vllm(each) for each in found] == [as_vllm(each) for each in given_outputs]
    assert [each.call for each in found] == [each.call for each in given_outputs]


@given(tokens)
def test_a_token_takes_five_bytes(token: int) -> None:
    output = j.Output(0, [j.Completion(0, [token])])
    data = j.encode_output(0, as_vllm(output), is_first=False)
    assert len(data) == 5
    assert j.decode(data) == (None, [output])


@given(st.binary(max_size=40))
def test_malformed_journals_raise_a_typed_error_only(data: bytes) -> None:
    try:
        j.decode(data)
    except HandoverError:
        return
    assert j.decode(b"") == (None, [])


def test_a_journal_that_ends_within_an_entry_is_malformed() -> None:
    data = j.encode_start(j.Start(1.5, 7))
    for end in range(1, len(data)):
        with pytest.raises(HandoverError):
            j.decode(data[:end])
