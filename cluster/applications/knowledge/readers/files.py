"""Text of an uploaded file.

Text and Markdown are read here, in time linear in their size. PDF, HTML and DOCX are read in
another process, whose memory and time are limited.
"""

import asyncio
from dataclasses import dataclass

from cluster.applications.knowledge.document import Document
from cluster.applications.knowledge.readers.detect import detect_type
from cluster.applications.knowledge.readers.process import read_in_process
from cluster.applications.knowledge.readers.text import decode_text, read_markdown, read_text
from cluster.config.applications import KnowledgeConfig
from cluster.errors import InvalidRequestError, PayloadTooLargeError
from cluster.tasks.knowledge import MediaType


@dataclass(frozen=True, slots=True)
class File:
    """Uploaded file."""

    name: str
    content: bytes
    type: MediaType | None = None
    """Type that the client stated; None: by name and content."""


async def read_file(file: File, config: KnowledgeConfig) -> Document:
    """Return the text of a file.

    Raises:
        InvalidRequestError: The type is unknown, not that of the content, or the file is damaged or
            without text.
        PayloadTooLargeError: A limit is exceeded.
    """
    type_ = detect_type(file.name, file.content, file.type)
    if type_ in ("text", "markdown"):
        document = await asyncio.to_thread(_read_plain, type_, file.content)
    else:
        document = await read_in_process(type_, file.content, config)
    if len(document.text) > config.max_document_chars:
        raise PayloadTooLargeError(
            f"The document has {len(document.text)} characters; the limit is "
            f"{config.max_document_chars} (applications.knowledge.max_document_chars). Split it.",
            param="file",
        )
    if not document.blocks:
        raise InvalidRequestError("The document has no text.", param="file")
    return document


def _read_plain(type_: MediaType, content: bytes) -> Document:
    text = decode_text(content)
    return read_markdown(text) if type_ == "markdown" else read_text(text)
