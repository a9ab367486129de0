import json

import pytest

from cluster.client import wire
from cluster.client.results import Candidate, Delta, Entity, LabelScore, Ranked
from cluster.errors import InvalidRequestError, OverloadedError, UnavailableError
from cluster.usage import Usage


def test_a_string_becomes_a_user_message() -> None:
    assert wire.messages("hi") == [{"role": "user", "content": "hi"}]
    assert wire.messages([{"role": "system", "content": "s"}])[0]["role"] == "system"


def test_none_values_are_not_sent() -> None:
    assert json.loads(wire.encode({"model": None, "n": 0})) == {"n": 0}


def test_completions_are_in_the_order_of_the_prompts() -> None:
    choice = {"finish_reason": "stop"}
    answer = {
        "id": "cmpl-1",
        "model": "m",
        "choices": [{**choice, "index": 1, "text": "b"}, {**choice, "index": 0, "text": "a"}],
        "usage": {"prompt_tokens": 3, "completion_tokens": 4},
    }
    first, second = wire.completions(answer)
    assert (first.text, second.text) == ("a", "b")
    assert first.usage == Usage(3, 0, 4)
    assert first.usage.total_tokens == 7


def test_entities_are_in_the_order_of_the_texts() -> None:
    anna = {"label": "PER", "score": 0.9, "text": "Anna", "start": 0, "end": 4}
    rows = [{"index": 1, "entities": []}, {"index": 0, "entities": [anna]}]
    assert wire.entities({"data": rows}) == [[Entity("PER", 0.9, "Anna", 0, 4)], []]


def test_scores_are_in_order_of_the_pairs_and_rankings_by_relevance() -> None:
    rows = [{"index": 1, "score": 0.5}, {"index": 0, "score": 0.25}]
    assert wire.scores({"data": rows}) == [0.25, 0.5]
    results = [{"index": 2, "relevance_score": 0.5}, {"index": 0, "relevance_score": 0.25}]
    assert wire.rankings({"results": results}) == [Ranked(2, 0.5), Ranked(0, 0.25)]


def test_candidates_are_grouped_by_mask() -> None:
    masks = [[{"token": 7, "token_str": "good", "score": 0.5}], []]
    rows = [{"index": 0, "masks": masks}]
    assert wire.candidates({"data": rows}) == [[[Candidate("good", 0.5)], []]]


def test_classifications_have_all_scores() -> None:
    row = {
        "index": 0,
        "label": "POSITIVE",
        "score": 0.9,
        "scores": [{"label": "POSITIVE", "score": 0.9}, {"label": "NEGATIVE", "score": 0.1}],
    }
    (result,) = wire.classifications({"data": [row]})
    assert result.label == "POSITIVE"
    assert result.scores[1] == LabelScore("NEGATIVE", 0.1)


def test_errors_have_types_and_details() -> None:
    body = InvalidRequestError("no", param="messages").body()
    with pytest.raises(InvalidRequestError, match="no") as caught:
        wire.decode(400, [], json.dumps(body).encode())
    assert caught.value.param == "messages"
    overloaded = wire.error_from(429, [(b"retry-after", b"3")], b"not json")
    assert isinstance(overloaded, OverloadedError)
    assert overloaded.retry_after_s == 3
    assert overloaded.message == "not json"


EVENTS = [
    {
        "choices": [
            {"index": 0, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}
        ]
    },
    {"choices": [{"index": 0, "delta": {"content": "Pa\nris"}, "finish_reason": None}]},
    {"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]},
    {"choices": [], "usage": {"prompt_tokens": 1, "completion_tokens": 2}},
]
STREAM = (
    b"".join(b"data: " + json.dumps(e).encode() + b"\n\n" for e in EVENTS) + b"data: [DONE]\n\n"
)


@pytest.mark.parametrize("size", [1, 2, 7, 50, len(STREAM)])
def test_deltas_do_not_depend_on_the_pieces_of_the_stream(size: int) -> None:
    reader = wire.DeltaReader()
    chunks = [STREAM[at : at + size] for at in range(0, len(STREAM), size)]
    assert [delta for chunk in chunks for delta in reader.feed(chunk)] == [
        Delta("Pa\nris"),
        Delta("", "stop"),
        Delta("", usage=Usage(1, 0, 2)),
    ]


def test_an_error_event_is_raised() -> None:
    event = b"data: " + json.dumps(UnavailableError("lost").body()).encode() + b"\n\n"
    with pytest.raises(UnavailableError, match="lost"):
        list(wire.DeltaReader().feed(event))
