"""Decoding of audio files, within limits of memory and time.

FFmpeg (PyAV) recognizes the format by the content: names and types that clients declare are
ignored.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from io import BytesIO
from itertools import chain
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from cluster.errors import InvalidRequestError, PayloadTooLargeError

if TYPE_CHECKING:
    from av import AudioFrame

CONTAINERS = (
    *("aac", "ac3", "aiff", "amr", "asf", "au", "avi", "caf", "eac3", "flac", "flv", "m4a"),
    *("matroska", "mov", "mp3", "mp4", "mpeg", "mpegts", "ogg", "w64", "wav", "webm"),
)
"""FFmpeg's names of the formats that are read. Playlists are not among them: FFmpeg would open the
files and addresses that they name."""
MIN_RATE = 1000
"""Lowest sample rate of a file, in Hz. Resampling multiplies the samples of lower ones too much."""
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
        InvalidRequestError: The file is empty, no audio, damaged, or below ``MIN_RATE``.
        PayloadTooLargeError: The recording is too long; decoding stops there.
    """
    if not content:
        raise InvalidRequestError("The audio file is empty.", param="file")
    import av

    try:
        pieces = list(_decode(content, rate, max_duration_s))
    except (av.error.FFmpegError, ValueError, OverflowError) as error:
        raise InvalidRequestError(
            "The audio file is damaged, or in no known format: "
            f"{error.strerror if isinstance(error, OSError) else error}.",
            param="file",
        ) from None
    if not any(map(len, pieces)):
        raise InvalidRequestError("The file has no audio.", param="file")
    return Audio(np.concatenate(pieces), rate)


def _decode(content: bytes, rate: int, max_duration_s: float) -> Iterator[Samples]:
    import av

    options = {"format_whitelist": ",".join(CONTAINERS), "protocol_whitelist": "none"}
    with av.open(BytesIO(content), mode="r", options=options) as container:
        stream = next(iter(container.streams.audio), None)
        if stream is None:
            return
        resampler = av.AudioResampler(format="flt", layout="mono", rate=rate)
        duration_s = 0.0
        for frame in chain(container.decode(stream), [None]):  # None flushes the resampler
            if frame is not None:
                duration_s += _duration_s(frame)
                # A sample more, for rounding.
                if duration_s > max_duration_s + 1 / rate:
                    raise _too_long(max_duration_s)
            for resampled in resampler.resample(frame):
                yield np.array(resampled.to_ndarray()[0], np.float32)


def _duration_s(frame: "AudioFrame") -> float:
    if frame.sample_rate < MIN_RATE:
        raise InvalidRequestError(
            f"The audio has a sample rate of {frame.sample_rate} Hz; the minimum is {MIN_RATE} Hz.",
            param="file",
        )
    return frame.samples / frame.sample_rate


def _too_long(max_duration_s: float) -> PayloadTooLargeError:
    return PayloadTooLargeError(
        f"The recording is longer than {max_duration_s:g} s (`audio.max_duration_s` of the model). "
        "Split it.",
        param="file",
    )
