"""Limits of images and videos in vLLM's loaders. Imports vLLM, which takes 15 seconds."""

import base64
import contextlib
from io import BytesIO
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.config import MediaConfig
from cluster.engines.media_fetch import MediaFailedError
from cluster.engines.vllm import internals
from cluster.engines.vllm.media import Media
from cluster.errors import InvalidRequestError, RequestError
from tests.cluster.images import bomb, data_url, png

SIDE = 64
pytestmark = [pytest.mark.timeout(300), pytest.mark.filterwarnings("default")]


def video_io(num_frames: int = 32, **options: Any) -> Any:
    return internals.VideoMediaIO(internals.ImageMediaIO(), num_frames, **options)


def media(frames: int) -> Media:
    """Return media whose limit allows a number of frames."""
    return Media(MediaConfig(max_pixels=frames * SIDE * SIDE))


def sequence(*frames: bytes) -> str:
    return "data:video/jpeg;base64," + ",".join(base64.b64encode(each).decode() for each in frames)


def clip(num_frames: int, kind: str = "mp4") -> bytes:
    import av
    import numpy as np

    file = BytesIO()
    with av.open(file, "w", format=kind) as container:
        stream: Any = container.add_stream("mjpeg" if kind == "avi" else "mpeg4", rate=8)
        stream.width = stream.height = SIDE
        stream.pix_fmt = "yuvj420p" if kind == "avi" else "yuv420p"
        for number in range(num_frames):
            pixels = np.full((SIDE, SIDE, 3), number, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    return file.getvalue()


def frames_of(loaded: Any) -> int:
    frames, _ = loaded.media
    return len(frames)


def test_frames_in_a_data_url_share_the_limit_of_pixels() -> None:
    frames = sequence(*[png("red", SIDE)] * 4)
    assert frames_of(media(4).load_data(frames, video_io())) == 4
    with pytest.raises(MediaFailedError, match="max_pixels"):
        media(3).load_data(frames, video_io())
    assert frames_of(media(3).load_data(frames, video_io(num_frames=3))) == 3
    with pytest.raises(MediaFailedError, match="max_pixels"):
        media(3).load_data(frames, video_io(num_frames=-1))


@pytest.mark.parametrize(
    "frame", [bomb(10_000, 10_000), bomb(100_000, 100_000), b"P6 1 1 255\nabc", b"", b"text"]
)
def test_bad_frames_are_refused(frame: bytes) -> None:
    with pytest.raises(InvalidRequestError):
        Media(MediaConfig()).load_data(sequence(png("red"), frame), video_io())


def test_frames_of_different_sizes_are_refused() -> None:
    with pytest.raises(InvalidRequestError, match="not a video"):
        media(9).load_data(sequence(png("red", 40), png("red", 50)), video_io())


@pytest.mark.parametrize("kind", ["mp4", "mov", "matroska", "avi"])
def test_the_frames_that_are_decoded_share_the_limit_of_pixels(kind: str) -> None:
    content = clip(20, kind)
    assert frames_of(media(20).load(content, video_io())) == 20
    assert frames_of(media(5).load(content, video_io(num_frames=5))) == 5
    for options in ({}, {"num_frames": -1}, {"num_frames": 6}):
        with pytest.raises(MediaFailedError, match="max_pixels"):
            media(5).load(content, video_io(**options))
    with pytest.raises(MediaFailedError, match="max_pixels"):
        media(5).load_data(data_url(content, "video/mp4"), video_io())


def test_loaders_of_models_have_the_limit() -> None:
    """This one samples by time: 20 frames at 8 per second are 5 frames at 2 per second."""
    content = clip(20)
    assert frames_of(media(5).load(content, video_io(video_backend="qwen3_vl"))) == 5
    with pytest.raises(MediaFailedError, match="max_pixels"):
        media(4).load(content, video_io(video_backend="qwen3_vl"))


@pytest.mark.parametrize(
    "content",
    [
        *(b"", b"text", b"#EXTM3U\n#EXTINF:1,\nfile:///etc/passwd\n", b"ffconcat version 1.0\n"),
        *(b"\x1a\x45\xdf\xa3", b"\0\0\0\x18ftypisom", b"RIFF\0\0\0\0AVI ", clip(2)[:200]),
        png("red"),
    ],
    ids=range(9),
)
def test_other_files_are_no_video(content: bytes) -> None:
    with pytest.raises(InvalidRequestError, match="not a video"):
        Media(MediaConfig()).load(content, video_io())


IMAGE, CLIP = png("red"), clip(3)


@st.composite
def damaged_files(draw: st.DrawFn) -> bytes:
    """Return an image or a video of which some bytes differ, or the start of one."""
    content = bytearray(draw(st.sampled_from([IMAGE, CLIP, clip(2, "avi")])))
    for _ in range(draw(st.integers(0, 4))):
        content[draw(st.integers(0, len(content) - 1))] = draw(st.integers(0, 255))
    return bytes(content[: draw(st.integers(0, len(content)))] if draw(st.booleans()) else content)


@settings(max_examples=100, deadline=None, database=None, derandomize=True)
@given(
    damaged_files() | st.binary(max_size=60),
    st.sampled_from(["image/png", "video/mp4", "video/jpeg", "text/plain", ""]),
    st.sampled_from(["image", "video"]),
)
def test_any_file_is_loaded_or_refused(content: bytes, media_type: str, kind: str) -> None:
    media_io = internals.ImageMediaIO() if kind == "image" else video_io()
    shared = media(30)
    with contextlib.suppress(RequestError, ValueError):  # vLLM's ValueError gets status 400
        assert shared.load_data(data_url(content, media_type), media_io)
    assert shared.load_data(data_url(IMAGE), internals.ImageMediaIO())


def test_vllm_opens_the_formats_that_are_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    # An engine that an earlier test built in this process has limited the formats for good.
    monkeypatch.setattr(internals.multimodal_image, "ALLOWED_IMAGE_FORMATS", ("PNG", "PPM"))
    name, registry = "http", internals.MEDIA_CONNECTOR_REGISTRY.name2class
    monkeypatch.setitem(registry, name, registry[name])
    image_io = internals.ImageMediaIO()
    netpbm = b"P6 1 1 255\nabc"
    assert image_io.load_bytes(netpbm)
    Media(MediaConfig()).install()
    with pytest.raises(ValueError, match="cannot identify"):
        image_io.load_bytes(netpbm)
    assert image_io.load_bytes(png("red"))
