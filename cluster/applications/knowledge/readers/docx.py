"""Headings, paragraphs and tables of DOCX files."""

import io
import re
import zipfile
from collections.abc import Iterator

from cluster.applications.knowledge.document import Piece
from cluster.errors import InvalidRequestError, PayloadTooLargeError

MAX_PARTS = 10_000
"""Files in the archive."""
_CONTENT = "word/document.xml"
_HEADING = re.compile(r"heading (\d)", re.IGNORECASE)


def docx_pieces(content: bytes, max_unpacked_bytes: int) -> Iterator[Piece]:
    """Yield the text of a DOCX file.

    Raises:
        InvalidRequestError: The file is no DOCX file.
        PayloadTooLargeError: Its unpacked content is too large.
    """
    check_archive(content, max_unpacked_bytes)
    import docx
    from docx.table import Table

    document = docx.Document(io.BytesIO(content))
    for item in document.iter_inner_content():
        if isinstance(item, Table):
            rows = (" | ".join(cell.text.strip() for cell in row.cells) for row in item.rows)
            yield Piece("\n".join(rows))
        else:
            yield Piece(item.text, level=_level(item))


def check_archive(content: bytes, max_unpacked_bytes: int) -> None:
    """Raise if an archive is not that of a DOCX file, or too large; unpack nothing.

    The stated sizes can be trusted: reading a part ends at its stated size.
    """
    try:
        parts = zipfile.ZipFile(io.BytesIO(content)).infolist()
    except (zipfile.BadZipFile, ValueError, NotImplementedError) as error:
        raise InvalidRequestError(f"The DOCX file is damaged: {error}") from None
    size = sum(part.file_size for part in parts)
    if size > max_unpacked_bytes or len(parts) > MAX_PARTS:
        raise PayloadTooLargeError(
            f"The DOCX file has {len(parts)} parts of {size} bytes when unpacked; the limits are "
            f"{MAX_PARTS} and {max_unpacked_bytes} (applications.knowledge.max_unpacked_bytes)."
        )
    if not any(part.filename == _CONTENT for part in parts):
        raise InvalidRequestError("The file is a ZIP archive, but no DOCX file.")


def _level(paragraph: object) -> int:
    style = getattr(paragraph, "style", None)
    name = (getattr(style, "name", None) or "").strip()
    if name.lower() == "title":
        return 1
    found = _HEADING.fullmatch(name)
    return min(int(found[1]), 6) if found else 0
