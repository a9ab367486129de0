"""Memory of decoded images and video frames, which all requests of a replica share.

Pixels are reserved before a file is decoded, and freed when the decoded object is: vLLM drops it
once the model's input is prepared from it.
"""

import weakref
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock

from cluster.engines.vllm.requests import add_decoded_pixels
from cluster.errors import OverloadedError, PayloadTooLargeError

RETRY_AFTER_S = 1.0


class DecodedPixels:
    """Number of pixels that are decoded now. Files are decoded in several threads."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._used = 0
        self._freed: deque[int] = deque()  # a finalizer may run while its thread has the lock

    @contextmanager
    def reserve(self, max_pixels: int) -> "Iterator[Reservation]":
        """Yield the reservation of one file, which ends with the block unless it is kept."""
        reservation = Reservation(self, max_pixels)
        try:
            yield reservation
        finally:
            reservation.end()

    def take(self, num_pixels: int, max_pixels: int) -> None:
        """Reserve pixels of the current request.

        Raises:
            PayloadTooLargeError: The request alone has too many.
            OverloadedError: All requests together have too many.
        """
        with self._lock:
            of_request = add_decoded_pixels(num_pixels)
            while self._freed:
                self._used -= self._freed.popleft()
            others = self._used
            is_free = others + num_pixels <= max_pixels
            if is_free:
                self._used += num_pixels
        if of_request > max_pixels:
            raise PayloadTooLargeError(
                f"The images and video frames of the request have {of_request} pixels or more; the "
                f"limit is {max_pixels} (media.max_decoded_pixels). Send fewer or smaller ones.",
            )
        if not is_free:
            raise OverloadedError(
                f"The replica has decoded images and video frames of {others} pixels, and these "
                f"have {num_pixels}; the limit is {max_pixels} (media.max_decoded_pixels). Retry "
                "later.",
                retry_after_s=RETRY_AFTER_S,
            )

    def free(self, num_pixels: int) -> None:
        self._freed.append(num_pixels)


class Reservation:
    """Pixels of one file.

    Args:
        pixels: The shared number.
        max_pixels: Limit of the shared number.
    """

    def __init__(self, pixels: DecodedPixels, max_pixels: int) -> None:
        self._pixels = pixels
        self._max_pixels = max_pixels
        self._taken = 0

    def grow_to(self, num_pixels: int) -> None:
        """Reserve as many pixels in total, if there are not enough yet; raises as ``take`` does."""
        if (more := num_pixels - self._taken) > 0:
            self._pixels.take(more, self._max_pixels)
            self._taken += more

    def keep_for(self, decoded: object) -> None:
        """Free the pixels with the decoded object instead of at the end of the block."""
        weakref.finalize(decoded, self._pixels.free, self._taken).atexit = False
        self._taken = 0

    def end(self) -> None:
        self._pixels.free(self._taken)
        self._taken = 0
