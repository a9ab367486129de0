"""Decoding of recordings, and the text forms of transcripts."""

import io
import math
import tracemalloc
import wave
from contextlib import suppress
from types import SimpleNamespace

import av
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from cluster.engines.vllm.audio import decode
from cluster.engines.vllm.transcripts import split_segments, srt, vtt
from cluster.errors import InvalidRequestError, PayloadTooLargeError

RATE, LIMIT_S = 16_000, 60.0
TONE = np.sin(np.arange(RATE * 2) * 0.3).astype(np.float32) / 2
FIRST = 100
"""Token of 0 s."""


def wav(samples: NDArray[np.float32], rate: int = RATE, channels: int = 1) -> bytes:
    file = io.BytesIO()
    with wave.open(file, "wb") as writer:
        writer.setnchannels(channels)
        writer.setsampwidth(2)
        writer.setframerate(rate)
        writer.writeframes((np.repeat(samples, channels) * 32767).astype("<i2").tobytes())
    return file.getvalue()


def encoded(container: str, codec: str, rate: int) -> bytes:
    file = io.BytesIO()
    with av.open(file, "w", format=container) as writer:
        stream = writer.add_stream(codec, rate=rate)
        assert isinstance(stream, av.AudioStream)
        stream.layout = "stereo"
        resampler = av.AudioResampler(format=stream.format.name, layout="stereo", rate=rate)
        frame = av.AudioFrame.from_ndarray(TONE.reshape(1, -1), format="flt", layout="mono")
        frame.sample_rate = RATE
        for resampled in [*resampler.resample(frame), *resampler.resample(None)]:
            writer.mux(stream.encode(resampled))
        writer.mux(stream.encode(None))
    return file.getvalue()


def low_rate_flac(rate: int) -> bytes:
    """Return a FLAC file that declares a rate below 1,000 Hz, in its header and its frames."""
    file = io.BytesIO()
    with av.open(file, "w", format="flac") as writer:
        stream = writer.add_stream("flac", rate=rate)
        assert isinstance(stream, av.AudioStream)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 4000), np.int16), "s16", "mono")
        frame.sample_rate = rate
        stream.layout = "mono"
        writer.mux(stream.encode(frame))
        writer.mux(stream.encode(None))
    return file.getvalue()


@pytest.mark.parametrize(
    ("container", "codec", "rate"),
    [
        ("mp3", "mp3", 44_100),
        ("ogg", "libopus", 48_000),
        ("flac", "flac", 44_100),
        ("mp4", "aac", 44_100),
        ("webm", "libopus", 48_000),
        ("aiff", "pcm_s16be", 22_050),
    ],
)
def test_every_common_format_is_read(container: str, codec: str, rate: int) -> None:
    audio = decode(encoded(container, codec, rate), RATE, LIMIT_S)
    assert audio.duration_s == pytest.approx(2, abs=0.1)
    assert audio.rate == RATE
    assert np.abs(audio.samples[RATE // 2 : RATE]).max() == pytest.approx(0.5, abs=0.1)


@pytest.mark.parametrize("channels", [1, 2, 6])
def test_channels_are_mixed(channels: int) -> None:
    audio = decode(wav(TONE, 8_000, channels), RATE, LIMIT_S)
    assert audio.samples.ndim == 1
    assert audio.duration_s == pytest.approx(4, abs=0.01)


def test_silence_is_recognized() -> None:
    assert decode(wav(np.zeros(RATE, np.float32)), RATE, LIMIT_S).is_silent
    assert not decode(wav(TONE), RATE, LIMIT_S).is_silent


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"hello " * 1000,
        wav(TONE)[:30],
        wav(TONE)[:44],
        b"\x89PNG\r\n\x1a\n" + bytes(1000),
        # FFmpeg would open the files and addresses in these.
        b"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\nfile:///etc/hostname\n#EXT-X-ENDLIST\n",
        b"ffconcat version 1.0\nfile /etc/hostname\n",
        b"v=0\no=- 0 0 IN IP4 127.0.0.1\nc=IN IP4 127.0.0.1\nm=audio 5004 RTP/AVP 0\n",
    ],
    ids=["empty", "text", "cut", "header", "image", "m3u8", "concat", "sdp"],
)
def test_what_is_no_audio_is_refused(content: bytes) -> None:
    with pytest.raises(InvalidRequestError) as error:
        decode(content, RATE, LIMIT_S)
    assert error.value.param == "file"


def test_a_recording_that_is_too_long_is_refused() -> None:
    with pytest.raises(PayloadTooLargeError, match="longer than 1 s"):
        decode(wav(TONE), RATE, 1.0)


def test_a_small_file_that_expands_is_refused() -> None:
    compressed = encoded("flac", "flac", 44_100)
    with pytest.raises(PayloadTooLargeError):
        decode(compressed, RATE, 0.5)


@pytest.mark.parametrize("rate", [1, 100, 999])
@pytest.mark.parametrize("container", ["wav", "flac"])
def test_a_low_rate_is_refused_before_it_expands(container: str, rate: int) -> None:
    content = wav(TONE[:50], rate) if container == "wav" else low_rate_flac(rate)
    with pytest.raises(InvalidRequestError, match=f"of {rate} Hz; the minimum is 1000 Hz"):
        decode(content, RATE, LIMIT_S)


def test_a_frame_is_refused_before_it_expands() -> None:
    tracemalloc.start()
    try:
        with pytest.raises(PayloadTooLargeError):
            decode(wav(TONE[:4000], 1000), 10_000_000, 0.01)
        assert tracemalloc.get_traced_memory()[1] < 1024**2
    finally:
        tracemalloc.stop()


def test_a_recording_of_the_longest_duration_is_read() -> None:
    assert decode(encoded("flac", "flac", 44_100), RATE, 2.0).duration_s == pytest.approx(2)


@given(st.binary(max_size=300), st.integers(0, 200))
def test_any_file_is_decoded_or_refused(content: bytes, position: int) -> None:
    damaged = wav(TONE[:200])
    damaged = damaged[:position] + content + damaged[position + len(content) :]
    for file in (content, damaged):
        with suppress(InvalidRequestError, PayloadTooLargeError):
            decode(file, RATE, LIMIT_S)


def spans(*tokens: int, window_s: float = 30.0) -> list[tuple[list[int], float, float]]:
    found = split_segments(tokens, [-0.5] * len(tokens), FIRST, window_s)
    return [(list(each.tokens), round(each.start_s, 2), round(each.end_s, 2)) for each in found]


def test_segments_lie_between_times() -> None:
    assert spans(FIRST, 1, 2, FIRST + 50, FIRST + 50, 3, FIRST + 75) == [
        ([1, 2], 0, 1.0),
        ([3], 1.0, 1.5),
    ]


def test_text_without_times_is_kept() -> None:
    assert spans(1, 2, window_s=4.0) == [([1, 2], 0, 4.0)]
    assert spans(1, FIRST + 50, 2, window_s=4.0) == [([1], 0, 1.0), ([2], 1.0, 4.0)]
    assert spans(FIRST, FIRST + 10) == []


@given(st.lists(st.integers(1, FIRST + 1500), max_size=60), st.floats(0.1, 30))
def test_segments_keep_all_tokens_in_order(tokens: list[int], window_s: float) -> None:
    found = list(split_segments(tokens, [0.0] * len(tokens), FIRST, window_s))
    assert [t for each in found for t in each.tokens] == [t for t in tokens if t < FIRST]
    times = [time for each in found for time in (each.start_s, each.end_s)]
    assert times == sorted(times)
    assert all(0 <= time <= window_s and math.isfinite(time) for time in times)


def test_subtitles() -> None:
    parts = [
        SimpleNamespace(start=0.0, end=1.5, text=" Hello\n\nthere "),
        SimpleNamespace(start=61.25, end=3661.0, text="a --> b"),
    ]
    assert srt(parts) == (
        "1\n00:00:00,000 --> 00:00:01,500\nHello there\n\n"
        "2\n00:01:01,250 --> 01:01:01,000\na -> b\n"
    )
    assert vtt(parts) == (
        "WEBVTT\n\n00:00:00.000 --> 00:00:01.500\nHello there\n\n"
        "00:01:01.250 --> 01:01:01.000\na -> b\n"
    )
    assert (srt([]), vtt([])) == ("", "WEBVTT\n")
