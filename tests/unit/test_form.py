import asyncio
import tracemalloc
from collections.abc import AsyncGenerator
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.datastructures import Headers
from starlette.formparsers import MultiPartException, MultiPartParser

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
        (f"--{BOUNDARY}\r\nContent-Disposition: form-data".encode(), "incomplete"),
        (part("model", b"w"), "incomplete"),
        (form(part("model", b"w", "\r\nX: " + "a" * 10_000)), "header"),
        (form(part("model", b"\xff")), "not UTF-8"),
        (form(part("model", b"w", '; filename="a"')), "is a file"),
        (b"x\r\n" + form(part("model", b"w")), "does not begin"),
    ],
)
def test_malformed_forms_are_refused(body: bytes, message: str) -> None:
    with pytest.raises(InvalidRequestError, match=message):
        read(body)


@pytest.mark.parametrize(
    "body",
    [
        part("x", b"", '\r\nContent-Disposition: form-data; name="model"'),
        part("model", b"w", '\r\ncontent-disposition: form-data; name="x"'),
        part("model", b"w", '\nContent-Disposition: form-data; name="x"'),
        part("x", b"w", '\r\nX: y\nContent-Disposition: form-data; name="model"'),
        part("model", f"a\r\n--{BOUNDARY}x".encode()),
        part("model", f"a\r\n--{BOUNDARY} ".encode()),
    ],
)
def test_forms_that_parsers_read_differently_are_refused(body: bytes) -> None:
    with pytest.raises(InvalidRequestError):
        read(form(body))


@pytest.mark.parametrize("charset", ["utf-7", "cp037", "utf-16", "latin-1", "", "none"])
def test_charsets_other_than_utf_8_are_refused(charset: str) -> None:
    body = form(part("+AG0-odel", b"w"))
    with pytest.raises(InvalidRequestError, match="charset"):
        read_form(body, f"{TYPE}; charset={charset}")


@pytest.mark.parametrize("charset", ["utf-8", '"UTF-8"', "utf8"])
def test_utf_8_may_be_declared(charset: str) -> None:
    found = read_form(form(part("model", "wé".encode())), f"{TYPE}; charset={charset}")
    assert found is not None
    assert found.model == "wé"


def test_many_boundaries_are_not_parsed() -> None:
    with pytest.raises(InvalidRequestError, match="boundary occurs"):
        read(form(part("file", f"\r\n--{BOUNDARY}x".encode() * 100_000)))
    with pytest.raises(InvalidRequestError, match="more than"):
        read(form() + f"\r\n--{BOUNDARY}--".encode() * 100_000)


def starlette_models(body: bytes, content_type: str, chunk_bytes: int) -> list[object] | None:
    """Return the models of a form as an engine reads it; None if it refuses the form."""

    async def chunks() -> AsyncGenerator[bytes, None]:
        for start in range(0, len(body), chunk_bytes):
            yield body[start : start + chunk_bytes]

    headers = Headers({"content-type": content_type})
    try:
        found = asyncio.run(MultiPartParser(headers, chunks()).parse())
    except MultiPartException:
        return None
    return list(found.getlist("model"))


PIECES = st.sampled_from(
    [
        *(
            b"\r\n",
            b"\n",
            b"\r",
            b"-",
            b"--",
            b":",
            b";",
            b'"',
            b" ",
            b"\\",
            b"\x00",
            b"\xff",
            b"w",
        ),
        *(b"model", b"+AG0-odel", "model".encode("cp037"), b"name=model", b'; name="model"'),
        *(
            b'; name="x"',
            b'; filename="a"',
            b"Content-Disposition: form-data",
            b"X: y",
            b"; name*=x",
        ),
        *(f"{end}{BOUNDARY}".encode() for end in ("", "--", "\r\n--", "\n--")),
        *(part(name, value) for name in ("model", "x", "+AG0-odel") for value in (b"w", b"v")),
        part("x", b"", '\r\nContent-Disposition: form-data; name="model"'),
    ]
)
MUTATIONS = st.lists(st.tuples(st.integers(0, 400), st.integers(0, 12), PIECES), max_size=4)
CHARSETS = st.sampled_from(["", "", "; charset=utf-8", "; charset=utf-7", "; charset=cp037"])


@given(st.lists(PIECES, max_size=6), MUTATIONS, CHARSETS, st.integers(1, 200))
def test_an_engine_reads_the_same_model(
    pieces: list[bytes],
    mutations: list[tuple[int, int, bytes]],
    charset: str,
    chunk_bytes: int,
) -> None:
    body = form(part("model", b"a"), part("file", b"".join(pieces)), part("language", b"en"))
    for position, num_removed, inserted in mutations:
        body = body[:position] + inserted + body[position + num_removed :]
    try:
        found = read_form(body, TYPE + charset)
    except InvalidRequestError:
        return
    assert found is not None
    models = starlette_models(body, TYPE + charset, chunk_bytes)
    if models is not None:
        assert [model for model in models if model] == ([found.model] if found.model else [])


def test_other_bodies_are_no_forms() -> None:
    assert read_form(b"{}", "multipart/form-data") is None
    assert read_form(b"{}", "text/csv") is None


@given(st.binary(max_size=400), st.binary(max_size=40))
def test_any_body_is_read_or_refused(content: bytes, tail: bytes) -> None:
    with suppress(InvalidRequestError):
        read(form(part("file", content), part("model", b"w")) + tail)
    with suppress(InvalidRequestError):
        read_form(content + tail, TYPE)
