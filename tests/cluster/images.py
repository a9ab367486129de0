"""Images, and requests with them, for tests."""

import base64
import struct
import zlib
from io import BytesIO
from typing import Any

CHAT, RESPONSES, MESSAGES = "/v1/chat/completions", "/v1/responses", "/v1/messages"


def png(color: str, side: int = 40) -> bytes:
    from PIL import Image

    file = BytesIO()
    Image.new("RGB", (side, side), color).save(file, "PNG")
    return file.getvalue()


def data_url(content: bytes, kind: str = "image/png") -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def bomb(width: int, height: int) -> bytes:
    """Return a small PNG file that declares many pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    rows = zlib.compress(bytes(1000))
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")
    )


def body(path: str, *urls: str, **fields: Any) -> dict[str, Any]:
    """Return a request with images in the format of an API."""
    fields = {"model": "gen", "temperature": 0, **fields}
    if path == RESPONSES:
        parts: list[Any] = [{"type": "input_text", "text": "What is this?"}]
        parts += [{"type": "input_image", "image_url": url} for url in urls]
        return {"input": [{"role": "user", "content": parts}], "max_output_tokens": 8, **fields}
    parts = [{"type": "text", "text": "What is this?"}]
    if path == CHAT:
        parts += [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    else:
        parts += [{"type": "image", "source": source(url)} for url in urls]
    return {"messages": [{"role": "user", "content": parts}], "max_tokens": 8, **fields}


def source(url: str) -> dict[str, str]:
    if not url.startswith("data:"):
        return {"type": "url", "url": url}
    kind, _, data = url.removeprefix("data:").partition(";base64,")
    return {"type": "base64", "media_type": kind, "data": data}
