import pickle

import pytest

from cluster import errors


def test_every_status_maps_to_a_typed_error_and_back() -> None:
    for status in (400, 401, 403, 404, 405, 413, 422, 429, 500, 503):
        error = errors.request_error_for(status, "why", "field")
        assert error.status == status
        assert error.body() == {
            "error": {"message": "why", "type": error.type, "param": "field", "code": status}
        }


@pytest.mark.parametrize(("status", "cls"), [(418, "InvalidRequestError"), (502, "InternalError")])
def test_an_unknown_status_maps_by_its_class(status: int, cls: str) -> None:
    assert type(errors.request_error_for(status, "?")).__name__ == cls


def test_errors_survive_pickling() -> None:
    error = errors.OverloadedError("full", param="model", retry_after_s=2.5)
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is errors.OverloadedError
    assert (copy.message, copy.param, copy.retry_after_s) == ("full", "model", 2.5)


def test_retry_after_is_whole_seconds_and_at_least_one() -> None:
    assert errors.OverloadedError("full", retry_after_s=0.2).headers() == {"retry-after": "1"}
    assert errors.OverloadedError("full").headers() == {}
