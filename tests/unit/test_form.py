import tracemalloc
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.errors import InvalidRequestError
from cluster.gateway.form import MAX_PARTS, FormBody, read_form

BOUNDARY = "a1B2"
TYPE = f"multipart/form-data; boundary={BOUNDARY}"


def part(name: str, value: bytes, more: str = "") -> bytes:
    head = f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="{name}"{more}\r\n\r\n'
    return head.encode() + value + b"\r\n"


def form(*parts: bytes) -> bytes:
    return b"".join(parts) + f"--{BOUNDARY}--\r\n".encode()


FILE = part(
    "file", b"RIFF\r\n--a1B\r\n\r\nname=model", '; filename="a.wav"\r\nContent-Type: audio/wav'
)


def read(body: bytes) -> FormBody:
    found = read_form(body, TYPE)
    assert found is not None
    return found


@pytest.mark.parametrize("parts", [(part("model", b"w"), FILE), (FILE, part("model", b"w"))])
def test_the_model_is_found_before_and_after_the_file(parts: tuple[bytes, ...]) -> None:
    body = read(form(*parts, part("language", b"en")))
    assert (body.model, body.stream) == ("w", False)


@pytest.mark.parametrize("value", [b"true", b"1", b"True"])
def test_streams_are_recognized(value: bytes) -> None:
    assert read(form(part("stream", value), FILE)).stream


def test_a_form_without_model_names_none() -> None:
    assert read(form(FILE)).model is None
    assert read(form(part("model", b""))).model is None


def test_a_file_is_not_copied() -> None:
    body = form(part("file", bytes(16 * 1024**2), '; filename="a"'), part("model", b"w"))
    tracemalloc.start()
    try:
        assert read(body).model == "w"
        assert tracemalloc.get_traced_memory()[1] < 1024**2
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (form(part("model", b"a"), part("model", b"b")), "several fields `model`"),
        (form(part("model", bytes(2000))), "longer than"),
        (form(*[part("x", b"")] * (MAX_PARTS + 1)), "more than"),
        (f"--{BOUNDARY}\r\nContent-Disposition: form-data".encode(), "no end of its headers"),
    ],
)
def test_malformed_forms_are_refused(body: bytes, message: str) -> None:
    with pytest.raises(InvalidRequestError, match=message):
        read(body)


def test_other_bodies_are_no_forms() -> None:
    assert read_form(b"{}", "multipart/form-data") is None
    assert read_form(b"{}", "text/csv") is None


@given(st.binary(max_size=400), st.binary(max_size=40))
def test_any_body_is_read_or_refused(content: bytes, tail: bytes) -> None:
    with suppress(InvalidRequestError):
        read(form(part("file", content), part("model", b"w")) + tail)
    with suppress(InvalidRequestError):
        read_form(content + tail, TYPE)
