"""Weights of a CTranslate2 model file (``model.bin``, format version 6)."""

import struct
from pathlib import Path
from typing import IO

import numpy as np
from numpy.typing import NDArray

from cluster.errors import BuildError

FORMAT_VERSION = 6
# CTranslate2's DataType; bfloat16 (5) has no numpy type and does not occur in our packages.
_DTYPES = {0: np.float32, 1: np.int8, 2: np.int16, 3: np.int32, 4: np.float16}

Weights = dict[str, NDArray[np.generic]]


def read_weights(path: Path, model: str) -> Weights:
    """Return the arrays of a model file by name; aliases are left out.

    Args:
        path: The file.
        model: Expected name of CTranslate2's specification, such as ``WhisperSpec``.

    Raises:
        BuildError: The file is not such a model, or is damaged.
    """
    try:
        with path.open("rb") as file:
            (version,) = _unpack(file, "I")
            spec = _text(file) if version == FORMAT_VERSION else ""
            if spec != model:
                raise BuildError(f"{path}: no {model} in format {FORMAT_VERSION} of CTranslate2")
            _revision, count = _unpack(file, "II")
            return dict(_variable(file) for _ in range(count))
    except (struct.error, KeyError, ValueError) as error:
        raise BuildError(f"{path}: damaged model file: {error!r}") from None


def _variable(file: IO[bytes]) -> tuple[str, NDArray[np.generic]]:
    name = _text(file)
    (rank,) = _unpack(file, "B")
    shape = _unpack(file, f"{rank}I")
    dtype, num_bytes = _unpack(file, "BI")
    return name, np.frombuffer(file.read(num_bytes), _DTYPES[dtype]).reshape(shape)


def _text(file: IO[bytes]) -> str:
    (length,) = _unpack(file, "H")
    return file.read(length).rstrip(b"\0").decode()


def _unpack(file: IO[bytes], layout: str) -> tuple[int, ...]:
    layout = f"<{layout}"
    return struct.unpack(layout, file.read(struct.calcsize(layout)))
