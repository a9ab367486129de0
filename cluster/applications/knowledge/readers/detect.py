"""Type of a file, by the client's statement or its name, checked against its content."""

from collections.abc import Mapping
from pathlib import PurePosixPath

from cluster.applications.knowledge.readers.text import decode_text
from cluster.errors import InvalidRequestError
from cluster.tasks.knowledge import MediaType

TYPES: Mapping[str, MediaType] = {
    ".txt": "text",
    ".text": "text",
    ".rst": "text",
    ".md": "markdown",
    ".markdown": "markdown",
    ".html": "html",
    ".htm": "html",
    ".xhtml": "html",
    ".pdf": "pdf",
    ".docx": "docx",
}
"""Types by the ending of a name."""
_PDF_HEAD_BYTES = 1024
"""Part of a PDF file in which its mark occurs (PDF 1.7, annex H, 3.4.1)."""
_ZIP_MARK = b"PK\x03\x04"
_HTML_HEAD_CHARS = 4096


def detect_type(name: str, content: bytes, stated: MediaType | None) -> MediaType:
    """Return the type of a file.

    Raises:
        InvalidRequestError: The type is unknown, or the content has another one.
    """
    type_ = stated or TYPES.get(PurePosixPath(name.lower()).suffix)
    found = _type_of_content(content)
    if type_ is None and found is None:
        endings = ", ".join(TYPES)
        raise InvalidRequestError(
            f"The type of {name!r} is unknown. Set `type`, or use a name with one of {endings}.",
            param="file",
        )
    type_ = type_ or found
    assert type_ is not None
    if type_ != found and (type_ in ("pdf", "docx") or found is not None):
        actual = found or "no such file"
        raise InvalidRequestError(
            f"{name!r} should be of the type {type_}, but its content is {actual}.", param="file"
        )
    if type_ == "html" and "<" not in decode_text(content)[:_HTML_HEAD_CHARS]:
        raise InvalidRequestError(f"{name!r} should be of the type html, but has no tags.")
    return type_


def _type_of_content(content: bytes) -> MediaType | None:
    """Return the type by the content's marks; None for text."""
    if b"%PDF-" in content[:_PDF_HEAD_BYTES]:
        return "pdf"
    # A ZIP file of another kind is found when it is opened.
    return "docx" if content.startswith(_ZIP_MARK) else None
