"""PDF, HTML and DOCX files: text, structure, and bounds of what reads them."""

import io
import zipfile
from typing import Any

import docx
import pytest

from cluster.applications.knowledge.document import Document
from cluster.applications.knowledge.readers.files import File, read_file
from cluster.config.applications import KnowledgeConfig
from cluster.errors import InvalidRequestError, PayloadTooLargeError


def make_pdf(pages: list[str], num_kids: int | None = None) -> bytes:
    """Return a PDF file; ``num_kids`` refers to its first page again and again."""
    kids = [f"{4 + 2 * index} 0 R" for index in range(len(pages))]
    kids = kids if num_kids is None else kids[:1] * num_kids
    objects = [
        "<</Type/Catalog/Pages 2 0 R>>",
        f"<</Type/Pages/Kids[{' '.join(kids)}]/Count {len(kids)}>>",
        "<</Type/Font/Subtype/Type1/BaseFont/Helvetica>>",
    ]
    for index, text in enumerate(pages):
        stream = f"BT /F1 12 Tf 72 720 Td ({text}) Tj ET"
        objects.append(
            "<</Type/Page/Parent 2 0 R/MediaBox[0 0 612 792]/Resources<</Font<</F1 3 0 R>>>>"
            f"/Contents {5 + 2 * index} 0 R>>"
        )
        objects.append(f"<</Length {len(stream)}>>stream\n{stream}\nendstream")
    content = b"%PDF-1.4\n"
    places = []
    for number, each in enumerate(objects, 1):
        places.append(len(content))
        content += f"{number} 0 obj{each}endobj\n".encode()
    start = len(content)
    content += f"xref\n0 {len(objects) + 1}\n0000000000 65535 f \n".encode()
    content += b"".join(f"{place:010} 00000 n \n".encode() for place in places)
    trailer = f"trailer<</Size {len(objects) + 1}/Root 1 0 R>>\nstartxref\n{start}\n%%EOF"
    return content + trailer.encode()


def make_docx() -> bytes:
    document = docx.Document()
    document.add_heading("Rivers", 1)
    document.add_paragraph("The Elbe rises in the mountains.")
    document.add_heading("Towns", 2)
    table = document.add_table(rows=1, cols=2)
    table.rows[0].cells[0].text, table.rows[0].cells[1].text = "Dresden", "Elbe"
    buffer = io.BytesIO()
    document.save(buffer)
    return buffer.getvalue()


def zipped(parts: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in parts.items():
            archive.writestr(name, content)
    return buffer.getvalue()


async def read(name: str, content: bytes, **limits: Any) -> Document:
    return await read_file(File(name, content), KnowledgeConfig(**limits))


def blocks_of(document: Document) -> list[tuple[Any, ...]]:
    return [(document.text[b.start : b.end], b.heading, b.page) for b in document.blocks]


async def test_a_pdf_file_has_pages() -> None:
    document = await read("a.pdf", make_pdf(["The Elbe rises.", "It ends in the sea."]))
    assert document.num_pages == 2
    assert blocks_of(document) == [("The Elbe rises.", (), 1), ("It ends in the sea.", (), 2)]


async def test_a_docx_file_has_headings_and_tables() -> None:
    document = await read("a.DOCX", make_docx())
    assert blocks_of(document) == [
        ("Rivers", ("Rivers",), None),
        ("The Elbe rises in the mountains.", ("Rivers",), None),
        ("Towns", ("Rivers", "Towns"), None),
        ("Dresden | Elbe", ("Rivers", "Towns"), None),
    ]


async def test_an_html_page_has_its_main_text() -> None:
    article = "<p>" + "The Elbe flows through Dresden and Hamburg to the sea. " * 5 + "</p>"
    page = f"""<html><head><title>t</title><script>var x;</script></head><body>
    <nav><a href="/">Home</a></nav><article><h1>Rivers</h1>{article}<h2>Towns</h2>{article}
    </article><footer>Imprint</footer></body></html>"""
    document = await read("a.html", page.encode())
    assert "Imprint" not in document.text
    assert "var x" not in document.text
    assert {heading for _, heading, _ in blocks_of(document)} == {("Rivers",), ("Rivers", "Towns")}
    assert (await read("b.html", b"<p>Short.</p>")).text == "Short."


@pytest.mark.parametrize(
    ("name", "content", "limits", "error", "message"),
    [
        ("a.pdf", make_pdf(["x"] * 3), {"max_pages": 2}, PayloadTooLargeError, "3 pages"),
        ("a.pdf", make_pdf(["x"], 100_000), {}, PayloadTooLargeError, "100000 pages"),
        ("a.pdf", b"%PDF-1.4\nbroken", {}, InvalidRequestError, "PDF"),
        ("a.pdf", make_pdf(["x"])[:200], {}, InvalidRequestError, None),
        ("a.docx", make_docx()[:500], {}, InvalidRequestError, "damaged"),
        ("a.docx", zipped({"a.txt": b"x"}), {}, InvalidRequestError, "no DOCX"),
        (
            "a.docx",
            zipped({"word/document.xml": b"\0" * 300_000_000}),
            {},
            PayloadTooLargeError,
            "unpacked",
        ),
        (
            "a.docx",
            zipped({"word/document.xml": b"<"}),
            {},
            InvalidRequestError,
            None,
        ),
        ("a.html", b"<p>" + b"long words " * 1000, {"max_document_chars": 1000},
         PayloadTooLargeError, "characters"),
        ("a.html", b"<div>" * 200_000, {}, InvalidRequestError, None),
        ("a.html", b"<p></p>", {}, InvalidRequestError, "no text"),
        ("a.pdf", make_pdf(["x"]), {"read_timeout_s": 0.01}, PayloadTooLargeError, "0.01 s"),
    ],
)  # fmt: skip
async def test_bad_files_have_typed_errors(
    name: str, content: bytes, limits: dict[str, Any], error: type[Exception], message: str | None
) -> None:
    with pytest.raises(error, match=message):
        await read(name, content, **limits)


async def test_entities_of_a_docx_file_are_not_expanded() -> None:
    lines = "".join(f'<!ENTITY e{i + 1} "{f"&e{i};" * 10}">' for i in range(9))
    bomb = (
        f'<?xml version="1.0"?><!DOCTYPE d [<!ENTITY e0 "x">{lines}]>'
        '<w:document xmlns:w="http://schemas.openxmlformats.org/wordprocessingml/2006/main">'
        "<w:body><w:p><w:r><w:t>&e9;</w:t></w:r></w:p></w:body></w:document>"
    )
    with zipfile.ZipFile(io.BytesIO(make_docx())) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    parts["word/document.xml"] = bomb.encode()
    with pytest.raises((InvalidRequestError, PayloadTooLargeError)):
        await read("a.docx", zipped(parts))
