import pickle
import re
from collections.abc import Iterator

import pytest

from cluster import errors
from cluster.errors import RequestError, TandemError


def subclasses(cls: type[TandemError]) -> Iterator[type[TandemError]]:
    for sub in cls.__subclasses__():
        if sub.__module__ == errors.__name__:
            yield sub
            yield from subclasses(sub)


def test_module_docstring_draws_the_class_tree() -> None:
    def tree(cls: type[TandemError], depth: int = 0) -> Iterator[tuple[int, str]]:
        yield depth, cls.__name__
        for sub in cls.__subclasses__():
            if sub.__module__ == errors.__name__:
                yield from tree(sub, depth + 1)

    lines = re.findall(r"^([ │├└─]*)(\w+Error)\b", errors.__doc__ or "", re.MULTILINE)
    assert [(len(indent) // 4, name) for indent, name in lines] == [
        (depth, name) for depth, name in tree(TandemError)
    ]


def test_each_status_maps_to_its_exception() -> None:
    own_status = [cls for cls in subclasses(RequestError) if "status" in vars(cls)]
    assert len({cls.status for cls in own_status}) == len(own_status)
    for cls in own_status:
        error = errors.request_error_for(cls.status, "why", "field")
        assert type(error) is cls
        assert error.body() == {
            "error": {"message": "why", "type": cls.type, "param": "field", "code": cls.status}
        }
    assert type(errors.request_error_for(500, "why")) is errors.InternalError


@pytest.mark.parametrize(("status", "cls"), [(418, "InvalidRequestError"), (502, "InternalError")])
def test_unknown_statuses_map_to_400_or_500(status: int, cls: str) -> None:
    assert type(errors.request_error_for(status, "?")).__name__ == cls


@pytest.mark.parametrize("cls", list(subclasses(RequestError)))
def test_request_errors_survive_pickling(cls: type[RequestError]) -> None:
    error = cls("full", param="model", retry_after_s=2.5)
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is cls
    assert (copy.message, copy.param, copy.retry_after_s) == ("full", "model", 2.5)


def test_retry_after_is_whole_seconds_and_at_least_one() -> None:
    assert errors.OverloadedError("full", retry_after_s=0.2).headers() == {"retry-after": "1"}
    assert errors.OverloadedError("full").headers() == {}
