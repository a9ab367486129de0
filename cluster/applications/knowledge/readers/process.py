"""Reading of a file in another process, whose memory and time are limited.

The process gets a line of JSON with the limits and then the file at its standard input, and writes
the document, or an error, as JSON.
"""

import asyncio
import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from cluster.applications.knowledge.document import Block, Document
from cluster.config.applications import KnowledgeConfig
from cluster.errors import InvalidRequestError, PayloadTooLargeError, request_error_for
from cluster.tasks.knowledge import MediaType

MAX_PROCESSES = 2
"""Processes at the same time; other files wait."""
_MODULE = "cluster.applications.knowledge.readers.child"
_threads = ThreadPoolExecutor(MAX_PROCESSES, "tandem-readers")


async def read_in_process(type_: MediaType, content: bytes, config: KnowledgeConfig) -> Document:
    """Return the text of a PDF, HTML or DOCX file; raises as ``read_file`` does."""
    limits = {
        "type": type_,
        "max_pages": config.max_pages,
        "max_chars": config.max_document_chars,
        "max_unpacked_bytes": int(config.max_unpacked_bytes),
        "memory_bytes": int(config.read_memory_bytes),
        "cpu_s": int(config.read_timeout_s) + 1,
    }
    request = json.dumps(limits).encode() + b"\n" + content
    run = asyncio.get_running_loop().run_in_executor
    answer = await run(_threads, _run, request, config.read_timeout_s)
    if "error" in answer:
        raise request_error_for(answer["status"], answer["error"], "file")
    blocks = tuple(
        Block(start, end, tuple(heading), page, level)
        for start, end, heading, page, level in answer["blocks"]
    )
    return Document(type_, answer["text"], blocks, answer["num_pages"])


def _run(request: bytes, timeout_s: float) -> Any:
    try:
        done = subprocess.run(
            [sys.executable, "-m", _MODULE],
            input=request,
            capture_output=True,
            timeout=timeout_s,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise PayloadTooLargeError(
            f"The file was not read within {timeout_s:g} s "
            "(applications.knowledge.read_timeout_s). Split it.",
            param="file",
        ) from None
    try:
        return json.loads(done.stdout)
    except ValueError:  # it was killed, or a library ended it
        raise InvalidRequestError(
            "The file cannot be read: it is damaged, or needs too much memory or time.",
            param="file",
        ) from None
