"""Decoding of audio files, within limits of memory and time.

FFmpeg (PyAV) recognizes the format by the content: names and types that clients declare are
ignored.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from io import BytesIO
from itertools import chain

import numpy as np
from numpy.typing import NDArray

from cluster.errors import InvalidRequestError, PayloadTooLargeError

FORMATS = (
    *("aac", "ac3", "aiff", "amr", "asf", "au", "avi", "caf", "eac3", "flac", "flv", "m4a"),
    *("matroska", "mov", "mp3", "mp4", "mpeg", "mpegts", "ogg", "w64", "wav", "webm"),
)
"""FFmpeg's names of the formats that are read. Playlists are not among them: FFmpeg would open the
files and addresses that they name."""
SILENCE_PEAK = 0.001
"""Largest sample (-60 dBFS) of a recording that counts as silent. Whisper invents words there."""

Samples = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Audio:
    """Decoded recording."""

    samples: Samples
    """Mono samples from -1 to 1."""
    rate: int
    """Samples per second."""

    @property
    def duration_s(self) -> float:
        return len(self.samples) / self.rate

    @property
    def is_silent(self) -> bool:
        return float(np.abs(self.samples).max(initial=0.0)) < SILENCE_PEAK


def decode(content: bytes, rate: int, max_duration_s: float) -> Audio:
    """Return the first audio stream of a file as mono samples at a rate.

    Raises:
        InvalidRequestError: The file is empty, no audio, or damaged.
        PayloadTooLargeError: The recording is too long; decoding stops there.
    """
    if not content:
        raise InvalidRequestError("The audio file is empty.", param="file")
    import av

    max_samples = int(max_duration_s * rate)
    pieces: list[Samples] = []
    num_samples = 0
    try:
        for piece in _decode(content, rate):
            num_samples += len(piece)
            if num_samples > max_samples:
                raise PayloadTooLargeError(
                    f"The recording is longer than {max_duration_s:g} s (`audio.max_duration_s` of "
                    "the model). Split it.",
                    param="file",
                )
            pieces.append(piece)
    except (av.error.FFmpegError, ValueError, OverflowError) as error:
        raise InvalidRequestError(
            "The audio file is damaged, or in no known format: "
            f"{error.strerror if isinstance(error, OSError) else error}.",
            param="file",
        ) from None
    if not num_samples:
        raise InvalidRequestError("The file has no audio.", param="file")
    return Audio(np.concatenate(pieces), rate)


def _decode(content: bytes, rate: int) -> Iterator[Samples]:
    import av

    options = {"format_whitelist": ",".join(FORMATS), "protocol_whitelist": "none"}
    with av.open(BytesIO(content), mode="r", options=options) as container:
        stream = next(iter(container.streams.audio), None)
        if stream is None:
            return
        resampler = av.AudioResampler(format="flt", layout="mono", rate=rate)
        for frame in chain(container.decode(stream), [None]):  # None flushes the resampler
            for resampled in resampler.resample(frame):
                yield np.array(resampled.to_ndarray()[0], np.float32)
