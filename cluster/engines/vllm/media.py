"""Images, audio and video of requests, within the limits of the configuration.

vLLM loads all of them, for every API, through its media connector. Ours takes the place of vLLM's,
which fetches any URL.
"""

import asyncio
from collections import Counter
from io import BytesIO
from typing import Any

from cluster.config import MediaConfig
from cluster.engines.media_fetch import MediaFailedError, MediaFetcher, MediaRefusedError
from cluster.engines.vllm import internals, video
from cluster.errors import InvalidRequestError

IMAGE_FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "PNG", "TIFF", "WEBP")
"""Formats of images; Pillow has decoders of many more, which only attackers would use."""
_CONNECTOR = "http"  # vLLM's name of the connector that it uses by default
_BASE64 = ";base64"


class Media:
    """Media of one engine."""

    def __init__(self, config: MediaConfig) -> None:
        self.counts: Counter[str] = Counter()
        """Fetched files by outcome."""
        self.configure(config)

    def configure(self, config: MediaConfig) -> None:
        """Apply other limits to new requests."""
        self._config = config
        self._fetchers: dict[tuple[str, ...], MediaFetcher] = {}

    def install(self) -> None:
        """Make vLLM load media here, in this process."""
        register = internals.MEDIA_CONNECTOR_REGISTRY.register(_CONNECTOR)
        register(_connector_class(self))
        # vLLM opens images with its own, longer list; the format that was checked must be the same.
        internals.multimodal_image.ALLOWED_IMAGE_FORMATS = IMAGE_FORMATS

    async def fetch(self, url: str, domains: tuple[str, ...]) -> bytes:
        """Return the file at a URL; ``domains`` are allowed in addition.

        Raises:
            MediaRefusedError: The configuration does not allow it.
            MediaFailedError: It was not delivered, or not within the limits.
        """
        if (fetcher := self._fetchers.get(domains)) is None:
            fetcher = self._fetchers[domains] = MediaFetcher(self._config, domains)
        outcome = "failed"
        try:
            content = await fetcher.fetch(url)
            outcome = "ok"
        except MediaRefusedError:
            outcome = "refused"
            raise
        finally:
            self.counts[outcome] += 1
        return content

    def load_data(self, url: str, media_io: Any) -> Any:
        """Return the medium in a data URL.

        Raises:
            InvalidRequestError: It is not encoded in base64, or exceeds a limit.
        """
        head, comma, data = url.partition(",")
        if not comma or not head.lower().endswith(_BASE64):
            raise InvalidRequestError("A data URL must be encoded in base64.", param="url")
        num_bytes = len(data) * 3 // 4
        if num_bytes > self._config.max_bytes:
            raise MediaFailedError(
                f"A file in the request has {num_bytes} bytes; the limit is "
                f"{int(self._config.max_bytes)} (media.max_bytes).",
                param="url",
            )
        media_type = head[len("data:") : -len(_BASE64)].partition(";")[0]
        if isinstance(media_io, internals.VideoMediaIO) and video.is_jpeg_sequence(media_type):
            frames = map(_decode, video.split_frames(data, media_io.num_frames))
            self._check_pixels(sum(map(count_pixels, frames)))
            return video.load_sequence(data, media_io)
        if isinstance(media_io, internals.ImageMediaIO | internals.VideoMediaIO):
            return self.load(_decode(data), media_io)
        return media_io.load_base64(media_type, data)

    def load(self, content: bytes, media_io: Any) -> Any:
        """Return the medium in a file.

        Raises:
            InvalidRequestError: It has no known format, or too many pixels.
        """
        if isinstance(media_io, internals.VideoMediaIO):
            return video.load_container(content, media_io, self._check_pixels)
        if isinstance(media_io, internals.ImageMediaIO):
            self._check_pixels(count_pixels(content))
        return media_io.load_bytes(content)

    def _check_pixels(self, num_pixels: int) -> None:
        if num_pixels > self._config.max_pixels:
            raise MediaFailedError(
                f"An image, or a video's frames together, have {num_pixels} pixels; the limit is "
                f"{self._config.max_pixels} (media.max_pixels).",
                param="url",
            )


def _decode(data: str) -> bytes:
    import pybase64  # of vLLM; decodes faster than the standard library

    try:
        return pybase64.b64decode(data, validate=True)
    except ValueError:
        raise InvalidRequestError("A data URL is not valid base64.", param="url") from None


def count_pixels(content: bytes) -> int:
    """Return the number of pixels of an image, without decoding it.

    Raises:
        InvalidRequestError: It is not an image of a known format.
    """
    from PIL import Image

    try:
        with Image.open(BytesIO(content), formats=IMAGE_FORMATS) as image:
            return image.width * image.height
    except Image.DecompressionBombError:
        raise MediaFailedError("An image has too many pixels (media.max_pixels).") from None
    except Exception:  # the decoders raise many types
        raise InvalidRequestError(
            f"A file is not an image that can be read; formats are {', '.join(IMAGE_FORMATS)}.",
            param="url",
        ) from None


def _connector_class(media: Media) -> type:
    class Connector(internals.MediaConnector):  # type: ignore[misc]
        async def load_from_url_async(self, url: str, media_io: Any, **options: Any) -> Any:
            try:
                if _is_data(url):
                    return await asyncio.to_thread(media.load_data, url, media_io)
                if _is_file(url) and self.allowed_local_media_path is not None:
                    return await super().load_from_url_async(url, media_io, **options)
                content = await media.fetch(url, tuple(self.allowed_media_domains))
                return await asyncio.to_thread(media.load, content, media_io)
            except InvalidRequestError as error:
                raise _as_vllms(error) from None

        def load_from_url(self, url: str, media_io: Any, **options: Any) -> Any:
            try:
                if _is_data(url):
                    return media.load_data(url, media_io)
                if _is_file(url) and self.allowed_local_media_path is not None:
                    return super().load_from_url(url, media_io, **options)
                raise MediaRefusedError(
                    "This API does not fetch the URLs of images, audio and video (`url`); send a "
                    "data URL, as `data:image/png;base64,…`.",
                    param="url",
                )
            except InvalidRequestError as error:
                raise _as_vllms(error) from None

    return Connector


def _is_data(url: str) -> bool:
    return url[:5].lower() == "data:"


def _is_file(url: str) -> bool:
    return url[:5].lower() == "file:"


def _as_vllms(error: InvalidRequestError) -> Exception:
    converted: Exception = internals.VLLMValidationError(str(error), parameter=error.param)
    return converted
