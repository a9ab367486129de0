"""Process that reads one PDF, HTML or DOCX file; see ``process``."""

import json
import resource
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from cluster.applications.knowledge.document import Document, Piece, join_pieces
from cluster.errors import PayloadTooLargeError, RequestError

Limits = Mapping[str, Any]
_HEAD_CHARS = 4096


def main() -> None:
    """Read the file at the standard input, and write its document as JSON."""
    limits = json.loads(sys.stdin.buffer.readline())
    resource.setrlimit(resource.RLIMIT_CPU, (limits["cpu_s"], limits["cpu_s"]))
    resource.setrlimit(resource.RLIMIT_AS, (limits["memory_bytes"], limits["memory_bytes"]))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    output, sys.stdout = sys.stdout, sys.stderr  # libraries may print
    try:
        answer = _encode(READERS[limits["type"]](sys.stdin.buffer.read(), limits))
    except RequestError as error:
        answer = {"status": error.status, "error": error.message}
    except MemoryError:
        answer = {"status": 413, "error": "The file needs too much memory to be read."}
    except Exception as error:  # of a library, about the file
        answer = {"status": 400, "error": f"The file cannot be read: {type(error).__name__}."}
    json.dump(answer, output)


def _encode(document: Document) -> dict[str, Any]:
    blocks = [(b.start, b.end, b.heading, b.page, b.level) for b in document.blocks]
    return {"text": document.text, "blocks": blocks, "num_pages": document.num_pages}


def read_pdf(content: bytes, limits: Limits) -> Document:
    """Return the paragraphs of a PDF file, by page."""
    from cluster.applications.knowledge.readers.pdf import pdf_pages

    pages = pdf_pages(content, limits["max_pages"])
    num_pages = 0

    def pieces() -> Iterator[Piece]:
        nonlocal num_pages
        for num_pages, text in enumerate(pages, 1):
            for paragraph in text.replace("\r", "").split("\n\n"):
                yield Piece(paragraph, page=num_pages)

    document = join_pieces("pdf", _limited(pieces(), limits))
    return Document("pdf", document.text, document.blocks, num_pages)


def read_html(content: bytes, limits: Limits) -> Document:
    """Return the main text of a page, without navigation and the like."""
    import trafilatura

    from cluster.applications.knowledge.readers.text import decode_text, read_markdown

    page = decode_text(content)
    if "<html" not in page[:_HEAD_CHARS].lower():  # trafilatura finds nothing in a fragment
        page = f"<html><body>{page}</body></html>"
    text = trafilatura.extract(
        page, output_format="markdown", include_comments=False, favor_recall=True
    )
    if not text:  # short pages
        text = trafilatura.html2txt(page)
    _check_chars(len(text), limits)
    markdown = read_markdown(text)
    return Document("html", markdown.text, markdown.blocks)


def read_docx(content: bytes, limits: Limits) -> Document:
    """Return headings, paragraphs and tables of a DOCX file."""
    from cluster.applications.knowledge.readers.docx import docx_pieces

    pieces = docx_pieces(content, limits["max_unpacked_bytes"])
    return join_pieces("docx", _limited(pieces, limits))


def _limited(pieces: Iterator[Piece], limits: Limits) -> Iterator[Piece]:
    num_chars = 0
    for piece in pieces:
        num_chars += len(piece.text)
        _check_chars(num_chars, limits)
        yield piece


def _check_chars(num_chars: int, limits: Limits) -> None:
    if num_chars > limits["max_chars"]:
        raise PayloadTooLargeError(
            f"The document has more than {limits['max_chars']} characters "
            "(applications.knowledge.max_document_chars). Split it."
        )


READERS: Mapping[str, Callable[[bytes, Limits], Document]] = {
    "pdf": read_pdf,
    "html": read_html,
    "docx": read_docx,
}

if __name__ == "__main__":
    main()
