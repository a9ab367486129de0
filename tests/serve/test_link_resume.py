"""Journals of answers on the link, and answers that another replica continues."""

import asyncio
import zlib

import pytest

from cluster.asgi import Receive, Scope, Send, journal_of
from cluster.errors import LinkRefusedError, UnavailableError
from cluster.link import AnswerRecord, RequestHead, Resume
from cluster.link.frames import JOURNAL_FORMAT, MAX_ENTRIES_BYTES
from tests.serve.link_kit import linked, on_both_loops, read_all, receive_body, send_body, send_head

TEXT = b"0123456789" * 20


async def counting(scope: Scope, receive: Receive, send: Send) -> None:
    """Send TEXT byte by byte; each byte is an entry. Continue behind the entries of a journal."""
    journal = journal_of(scope)
    assert journal is not None
    assert await receive_body(receive) == b"the request"
    await send_head(send)
    assert TEXT.startswith(journal.earlier)
    for at in range(len(TEXT)):
        if at >= len(journal.earlier):
            journal.add(TEXT[at : at + 1])
        await send_body(send, TEXT[at : at + 1])
        await asyncio.sleep(0)
    await send_body(send, b"", more=False)


def resumed(journal: bytes, delivered: bytes) -> tuple[RequestHead, bytes]:
    resume = Resume(len(journal), len(delivered), zlib.crc32(delivered))
    return RequestHead(
        keeps_journal=True, journal_format=JOURNAL_FORMAT, resume=resume
    ), journal + b"the request"


@on_both_loops
async def test_a_journal_arrives_with_the_bytes_that_follow_from_it() -> None:
    async with linked(counting, resumes=True) as (_, client):
        stream = client.open(
            RequestHead(keeps_journal=True, journal_format=JOURNAL_FORMAT), b"the request"
        )
        record = stream.record = AnswerRecord()
        received = b""
        while piece := await stream.read():
            received += piece
            assert record.journal.startswith(received)
            arrived = len(record.journal)
            assert record.resume() == Resume(arrived, arrived, zlib.crc32(record.journal))
        assert received == TEXT


@on_both_loops
async def test_an_answer_is_continued_behind_the_bytes_that_the_client_has() -> None:
    async with linked(counting, resumes=True) as (_, client):
        for num_entries, num_bytes in ((0, 0), (5, 5), (50, 31), (200, 200), (200, 0)):
            stream = client.open(*resumed(TEXT[:num_entries], TEXT[:num_bytes]))
            record = stream.record = AnswerRecord()
            assert await read_all(stream) == TEXT[num_bytes:]
            assert record.journal == TEXT[num_entries:]
            rest = TEXT[num_bytes:]
            assert record.resume() == Resume(200 - num_entries, len(rest), zlib.crc32(rest))


@on_both_loops
async def test_a_journal_larger_than_the_window_arrives() -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        journal = journal_of(scope)
        body = await receive_body(receive)
        assert journal is not None
        await send_head(send)
        await send_body(send, f"{len(journal.earlier)} {len(body)}".encode(), more=False)

    async with linked(app, resumes=True) as (_, client):
        for journal_bytes, body_bytes in ((3_000_000, 2_000_000), (3_000_000, 0), (0, 1)):
            head = RequestHead(
                keeps_journal=True,
                journal_format=JOURNAL_FORMAT,
                resume=Resume(journal_bytes, 0, 0),
            )
            stream = client.open(head, bytes(journal_bytes + body_bytes))
            assert await read_all(stream) == f"{journal_bytes} {body_bytes}".encode()


@on_both_loops
async def test_an_answer_that_differs_is_not_continued() -> None:
    async with linked(counting, resumes=True) as (_, client):
        for delivered in (b"0123x", TEXT + b"more"):
            stream = client.open(*resumed(TEXT[:5], delivered))
            with pytest.raises(UnavailableError, match="try again"):
                await read_all(stream)


@on_both_loops
async def test_a_journal_that_grows_too_fast_is_dropped() -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        journal = journal_of(scope)
        assert journal is not None
        await send_head(send)
        await send_body(send, b"a")
        journal.add(bytes(MAX_ENTRIES_BYTES + 1))
        await send_body(send, b"b")
        journal.add(b"more")
        assert not journal.unsent
        await send_body(send, b"c", more=False)

    async with linked(app, resumes=True) as (_, client):
        stream = client.open(RequestHead(keeps_journal=True, journal_format=JOURNAL_FORMAT))
        stream.record = AnswerRecord()
        assert await read_all(stream) == b"abc"
        assert not stream.record.has_journal


@on_both_loops
async def test_large_pieces_carry_their_entries_first() -> None:
    large = bytes(range(256)) * 2000

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        journal = journal_of(scope)
        assert journal is not None
        await send_head(send)
        journal.add(b"1")
        await send_body(send, large)
        journal.add(b"2")
        await send_body(send, large, more=False)

    async with linked(app, resumes=True) as (_, client):
        stream = client.open(RequestHead(keeps_journal=True, journal_format=JOURNAL_FORMAT))
        record = stream.record = AnswerRecord()
        assert await read_all(stream) == large * 2
        assert record.resume() == Resume(2, 2 * len(large), zlib.crc32(large * 2))
        assert record.journal == b"12"


@on_both_loops
async def test_pieces_that_are_sent_at_once_share_frames() -> None:
    pieces = [bytes([number % 256]) * ((number % 7 + 1) * 1000) for number in range(400)]

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        journal = journal_of(scope)
        await send_head(send)
        for number, piece in enumerate(pieces):
            if journal is not None:
                journal.add(bytes([number % 256]))
            await send_body(send, piece, more=number < len(pieces) - 1)

    async with linked(app, resumes=True) as (server, client):
        for keeps_journal in (False, True):
            num_sent = server.counts.frames_sent
            stream = client.open(
                RequestHead(keeps_journal=keeps_journal, journal_format=JOURNAL_FORMAT)
            )
            record = stream.record = AnswerRecord() if keeps_journal else None
            assert await read_all(stream) == b"".join(pieces)
            assert server.counts.frames_sent - num_sent < len(pieces) / 10
            if record is not None:
                assert record.journal == bytes(number % 256 for number in range(len(pieces)))


@on_both_loops
async def test_a_server_without_journals_refuses_to_continue() -> None:
    async with linked(counting) as (_, client):
        for head in (
            resumed(b"", b"")[0],
            RequestHead(keeps_journal=True, journal_format=JOURNAL_FORMAT),
        ):
            with pytest.raises(LinkRefusedError):
                await client.open(head, b"the request").head()
