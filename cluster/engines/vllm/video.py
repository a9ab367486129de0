"""Limits of videos, before vLLM decodes them.

vLLM opens any file that FFmpeg recognizes, playlists included, and has no limit of all frames.
"""

from collections.abc import Callable
from io import BytesIO
from typing import Any

from cluster.errors import InvalidRequestError

VIDEO_FORMATS = ("avi", "matroska", "mov", "mp4", "webm")
"""FFmpeg's names of the containers that are read. Playlists are not among them: FFmpeg would open
the files and addresses that they name."""
_SIGNATURES = ((0, b"\x1a\x45\xdf\xa3"), (4, b"ftyp"), (8, b"AVI "))  # Matroska; MP4 and MOV; AVI
_JPEG_SEQUENCE = "video/jpeg"


Check = Callable[[int], None]
"""Raises if a number of pixels, of all decoded frames together, is above the limit."""


def is_jpeg_sequence(media_type: str) -> bool:
    """Return True if the data are JPEG files in base64, separated by commas."""
    return media_type.lower() == _JPEG_SEQUENCE


def split_frames(data: str, max_frames: int) -> list[str]:
    """Return the frames of a JPEG sequence that vLLM decodes; it ignores the rest."""
    return data.split(",", max_frames)[:max_frames] if max_frames > 0 else data.split(",")


def load_sequence(data: str, media_io: Any) -> Any:
    """Return the video in a JPEG sequence whose frames were checked.

    Raises:
        InvalidRequestError: vLLM cannot read it.
    """
    return _load(lambda: media_io.load_base64(_JPEG_SEQUENCE, data))


def load_container(content: bytes, media_io: Any, check: Check) -> Any:
    """Return the video in a file.

    Raises:
        InvalidRequestError: Its format is unknown, it is damaged, or it has too many pixels.
    """
    pixels_per_frame = _frame_pixels(content)
    check(pixels_per_frame)
    media_io.video_loader = _limited(
        media_io.video_loader, pixels_per_frame, check, max_frames=len(content)
    )
    return _load(lambda: media_io.load_bytes(content))


def _load(load: Callable[[], Any]) -> Any:
    try:
        return load()
    except InvalidRequestError:
        raise
    except Exception:  # the decoders raise many types
        raise _unreadable() from None


def _frame_pixels(content: bytes) -> int:
    """Return width times height as the container and its first frames declare them."""
    if not any(content.startswith(magic, start) for start, magic in _SIGNATURES):
        raise _unreadable()
    import av

    options = {"format_whitelist": ",".join(VIDEO_FORMATS), "protocol_whitelist": "none"}
    try:
        with av.open(BytesIO(content), mode="r", options=options) as container:
            pixels = [stream.width * stream.height for stream in container.streams.video]
    except Exception:  # also ValueError and OverflowError, for damaged headers
        raise _unreadable() from None
    if not pixels or min(pixels) <= 0:
        raise _unreadable()
    return max(pixels)


def _limited(loader: Any, pixels_per_frame: int, check: Check, max_frames: int) -> Any:
    """Return vLLM's loader with a limit.

    Every decoder of vLLM asks its loader for the frames to decode before it decodes any.
    """

    class Limited(type(loader)):  # type: ignore[misc]
        @classmethod
        def compute_frames_index_to_sample(cls, source: Any, target: Any, **options: Any) -> Any:
            if source.total_frames_num > max_frames:  # each frame takes a byte at least
                raise _unreadable()
            indices = super().compute_frames_index_to_sample(source, target, **options)
            check(len(indices) * pixels_per_frame)
            return indices

    return Limited()


def _unreadable() -> InvalidRequestError:
    return InvalidRequestError(
        "A file is not a video that can be read; formats are AVI, Matroska, MOV, MP4 and WebM, and "
        "JPEG frames as `data:video/jpeg;base64,…,…`.",
        param="url",
    )
