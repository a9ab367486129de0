"""Text of PDF files, by page."""

import io
from collections.abc import Iterator

import pypdf

from cluster.errors import InvalidRequestError, PayloadTooLargeError


def pdf_pages(content: bytes, max_pages: int) -> Iterator[str]:
    """Yield the text of each page.

    Raises:
        InvalidRequestError: The file is damaged or encrypted.
        PayloadTooLargeError: It has too many pages.
    """
    try:
        reader = pypdf.PdfReader(io.BytesIO(content))
        if reader.is_encrypted and not reader.decrypt(""):
            raise InvalidRequestError("The PDF file is encrypted.")
        num_pages = len(reader.pages)
    except pypdf.errors.PyPdfError as error:
        raise InvalidRequestError(f"The PDF file cannot be read: {error}") from None
    if num_pages > max_pages:
        raise PayloadTooLargeError(
            f"The PDF file has {num_pages} pages; the limit is {max_pages} "
            "(applications.knowledge.max_pages). Split it."
        )
    for page in reader.pages:
        yield page.extract_text()
