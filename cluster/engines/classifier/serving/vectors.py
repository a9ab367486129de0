"""Vectors in the formats of replies: JSON numbers, base64, or bytes."""

import base64
import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from msgspec import Raw
from msgspec.json import Encoder
from numpy.typing import NDArray

from cluster.engines.classifier.model.types import Rows
from cluster.engines.classifier.serving.inputs import InputRequest
from cluster.engines.classifier.serving.schema import ReplyUsage
from cluster.errors import InvalidRequestError

encode_json = Encoder().encode

EmbedDtype = Literal["float32", "float16", "bfloat16", "fp8_e4m3", "fp8_e5m2"]
Endianness = Literal["native", "big", "little"]

_TORCH_DTYPES: Mapping[str, tuple[torch.dtype, torch.dtype]] = {
    "float16": (torch.float16, torch.int16),
    "bfloat16": (torch.bfloat16, torch.int16),
    "fp8_e4m3": (torch.float8_e4m3fn, torch.uint8),
    "fp8_e5m2": (torch.float8_e5m2, torch.uint8),
}
"""Type of the values, and type by which numpy handles their bytes."""

_MIN_EXPONENT = -48
_EXPONENTS = range(_MIN_EXPONENT, 129)
# Powers of ten up to 1e22 are exact. A float32 below 2**e is a multiple of 2**(e - 24) and is the
# nearest one to its decimal if the last digit is worth less than that.
_SCALES = np.array([float(f"1e{max(0, int((24 - e) * math.log10(2)) + 1)}") for e in _EXPONENTS])

MAX_METADATA_TEXTS = 64
"""Texts whose metadata, about 110 bytes each, fit a header of 8 KiB; HAProxy's buffer is 16 KiB."""


class VectorRequest(InputRequest, frozen=True, kw_only=True):
    """Request for vectors in one of several formats."""

    encoding_format: Literal["float", "base64", "bytes", "bytes_only"] = "float"
    """``bytes`` returns the values as the body and describes them in the header ``metadata``;
    ``bytes_only`` leaves out the header."""
    embed_dtype: EmbedDtype = "float32"
    """Type of the values in ``base64`` and bytes."""
    endianness: Endianness = "native"
    """Byte order of the values in ``base64`` and bytes; natively little-endian."""

    @property
    def is_binary(self) -> bool:
        return self.encoding_format in ("bytes", "bytes_only")


@dataclass(frozen=True, slots=True)
class BinaryReply:
    """Reply of bytes; ``metadata`` is a header, or None."""

    content: bytes
    metadata: str | None = None


def check_format(request: VectorRequest, num_texts: int) -> None:
    """Raise ``InvalidRequestError`` if the metadata of all texts do not fit a header."""
    if request.encoding_format == "bytes" and num_texts > MAX_METADATA_TEXTS:
        message = (
            f"encoding_format `bytes` describes each of the {num_texts} texts in a header; the "
            f"limit is {MAX_METADATA_TEXTS} texts. Use `bytes_only` or `base64`."
        )
        raise InvalidRequestError(message, param="encoding_format")


def to_json(request: VectorRequest, rows: Rows | Sequence[Rows]) -> list[Any]:
    """Return each row as numbers, exact to the last bit of float32, or in base64."""
    if request.encoding_format == "base64":
        return [base64.b64encode(_to_bytes(request, row)).decode("ascii") for row in rows]
    # Row by row: encoding thousands of rows in one call would hold the GIL throughout.
    return [Raw(encode_json(_shorten(row).tolist())) for row in rows]


def to_binary(
    request: VectorRequest,
    rows: Rows | Sequence[Rows],
    reply_id: str,
    created: int,
    model: str,
    usage: ReplyUsage,
) -> BinaryReply:
    """Return all rows as one body, in vLLM's format."""
    parts = [_to_bytes(request, row) for row in rows]
    if request.encoding_format == "bytes_only":
        return BinaryReply(b"".join(parts))
    items: list[dict[str, object]] = []
    start = 0
    for index, (row, part) in enumerate(zip(rows, parts, strict=True)):
        items.append(
            {
                "index": index,
                "embed_dtype": request.embed_dtype,
                "endianness": request.endianness,
                "start": start,
                "end": start + len(part),
                "shape": list(row.shape),
            }
        )
        start += len(part)
    tokens = {"prompt_tokens": usage.prompt_tokens, "total_tokens": usage.total_tokens}
    head = {"id": reply_id, "created": created, "model": model, "data": items, "usage": tokens}
    return BinaryReply(b"".join(parts), json.dumps(head))


def _to_bytes(request: VectorRequest, row: Rows) -> bytes:
    array: NDArray[np.generic] = np.ascontiguousarray(row, np.float32)
    if request.embed_dtype != "float32":
        dtype, view = _TORCH_DTYPES[request.embed_dtype]
        array = torch.from_numpy(array).to(dtype).view(view).numpy()
    if request.endianness not in ("native", sys.byteorder):
        array = array.byteswap()
    return array.tobytes()


def _shorten(row: Rows) -> NDArray[np.float64]:
    """Round to the decimals that identify each float32, so that JSON has no more than these."""
    values = row.astype(np.float64)
    exponents = np.frexp(row)[1]
    if exponents.min(initial=0) < _MIN_EXPONENT:
        return values
    scale = _SCALES[exponents - _MIN_EXPONENT]
    return np.asarray(np.rint(values * scale) / scale)
