import pytest

from cluster.routing import Fingerprint, TokenEstimator
from cluster.routing.fingerprint import FanOut
from cluster.routing.request import MAX_TOKEN_BYTES
from cluster.usage import Usage

TEXT = Fingerprint((1, 2), (128, 256), 400, session="u", max_tokens=5)


def test_tokens_per_byte_are_learned() -> None:
    estimate = TokenEstimator(generates=True)
    for _ in range(500):
        estimate.learn_usage(2000, Usage(200, 0, 50), TEXT)
    view = estimate.view_request(2000, TEXT)
    assert view.prompt_tokens == pytest.approx(200, rel=0.02)
    assert view.prefix == (1, 2)
    assert view.prefix_tokens == pytest.approx((64, 128), rel=0.02)


def test_without_a_fingerprint_the_body_length_counts() -> None:
    assert TokenEstimator(generates=False).view_request(4000).prompt_tokens == 1000


def test_token_ids_are_counted_exactly_and_do_not_change_the_ratio() -> None:
    estimate = TokenEstimator(generates=True)
    ids = Fingerprint((1,), (128,), 400, is_tokens=True)
    before = estimate.tokens_per_byte
    estimate.learn_usage(9000, Usage(100, 0, 1), ids)
    assert estimate.tokens_per_byte == before
    view = estimate.view_request(9000, ids)
    assert (view.prompt_tokens, view.prefix_tokens) == (100, (32,))


@pytest.mark.parametrize(("most", "expected"), [(5, 5), (10**9, 128), (0, 0), (-3, 0)])
def test_the_expected_completion_respects_max_tokens(most: int, expected: float) -> None:
    view = TokenEstimator(generates=True).view_request(10, Fingerprint(max_tokens=most))
    assert view.completion_tokens == expected


def test_a_session_header_overrides_the_body() -> None:
    estimate = TokenEstimator(generates=True)
    assert estimate.view_request(10, TEXT).session == "u"
    assert estimate.view_request(10, TEXT, "header").session == "header"


def test_the_usual_cache_hits_reduce_the_work() -> None:
    estimate = TokenEstimator(generates=True)
    assert estimate.work_tokens(estimate.view_request(400)) == pytest.approx(100 + 128)
    assert estimate.work_tokens(estimate.view_request(0, max_tokens=0)) == 1
    for _ in range(500):
        estimate.learn_usage(400, Usage(100, 75, 10))
    view = estimate.view_request(400, max_tokens=1000)
    assert view.prompt_tokens == pytest.approx(100, rel=0.05)
    assert estimate.work_tokens(view) == pytest.approx(25 + 10, rel=0.1)


def test_a_huge_max_tokens_is_accepted() -> None:
    asked = Fingerprint((), (), 4, max_tokens=10**400)
    assert TokenEstimator(generates=True).view_request(4, asked).completion_tokens == 128


def test_estimates_are_limited_by_the_models_context() -> None:
    estimate = TokenEstimator(generates=True)
    assert not estimate.exceeds_context(Fingerprint(total_bytes=10**9))  # unknown
    estimate.context_tokens = 100
    view = estimate.view_request(10**6)
    assert (view.prompt_tokens, view.completion_tokens) == (100, 100)
    assert not estimate.exceeds_context(Fingerprint(total_bytes=100 * MAX_TOKEN_BYTES))
    assert estimate.exceeds_context(Fingerprint(total_bytes=100 * MAX_TOKEN_BYTES + 1))
    assert estimate.exceeds_context(Fingerprint(total_bytes=404, is_tokens=True))


def test_every_sequence_of_a_request_counts() -> None:
    estimate = TokenEstimator(generates=True)
    fan_out = FanOut(prompts=3, sequences=12)
    first = Fingerprint(total_bytes=40)
    view = estimate.view_request(4000, first, max_tokens=50, fan_out=fan_out)
    assert view.prompt_tokens == 1000  # of the whole body, not of the first prompt
    assert view.completion_tokens == 12 * 50
    for _ in range(1000):
        estimate.learn_usage(4000, Usage(1000, 0, 12 * 20), first, fan_out)
    assert estimate.view_request(4000).completion_tokens == pytest.approx(20, rel=0.01)
    assert estimate.tokens_per_byte == pytest.approx(0.25)
