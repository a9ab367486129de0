"""Text forms of a transcript, and its segments."""

import zlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

SECONDS_PER_STEP = 0.02
"""Resolution of Whisper's time tokens."""


class Span(NamedTuple):
    """Tokens of one segment, and its times in seconds from the beginning of its window."""

    tokens: tuple[int, ...]
    avg_logprob: float
    start_s: float
    end_s: float


def split_segments(
    tokens: Sequence[int], logprobs: Sequence[float], first_time: int, window_s: float
) -> Iterator[Span]:
    """Yield the segments of a window.

    Whisper writes a time before and after each segment. Small models leave times out: text before
    the first one begins with the window, and text after the last one ends with it.

    Args:
        tokens: Generated tokens, without the end.
        logprobs: Log-probability of each token.
        first_time: The token of 0 s; larger ones are later times.
        window_s: Length of the window, in seconds.
    """
    texts: list[int] = []
    sum_logprobs = start_s = 0.0
    for token, logprob in zip(tokens, logprobs, strict=True):
        if token < first_time:
            texts.append(token)
            sum_logprobs += logprob
            continue
        time_s = min((token - first_time) * SECONDS_PER_STEP, window_s)
        if texts:
            end_s = max(start_s, time_s)
            yield Span(tuple(texts), sum_logprobs / len(texts), start_s, end_s)
            texts, sum_logprobs = [], 0.0
        start_s = max(start_s, time_s)
    if texts:
        end_s = max(start_s, window_s)
        yield Span(tuple(texts), sum_logprobs / len(texts), start_s, end_s)


def compression_ratio(text: str) -> float:
    """Return the ratio by which zlib shortens a text; it is high where a model repeats itself."""
    encoded = text.encode()
    return len(encoded) / len(zlib.compress(encoded))


def srt(segments: Iterable[Any]) -> str:
    """Return segments (``start``, ``end``, ``text``) as SubRip subtitles."""
    blocks = (
        f"{number}\n{_time(each.start, ',')} --> {_time(each.end, ',')}\n{_line(each.text)}\n"
        for number, each in enumerate(segments, 1)
    )
    return "\n".join(blocks)


def vtt(segments: Iterable[Any]) -> str:
    """Return segments (``start``, ``end``, ``text``) as WebVTT subtitles."""
    blocks = (
        f"{_time(each.start, '.')} --> {_time(each.end, '.')}\n{_line(each.text)}\n"
        for each in segments
    )
    return "\n".join(("WEBVTT\n", *blocks))


def _line(text: str) -> str:
    # A line with an arrow would be read as times, and an empty one as the end of the subtitle.
    return " ".join(text.split()).replace("-->", "->")


def _time(seconds: float, point: str) -> str:
    milliseconds = round(seconds * 1000)
    minutes, milliseconds = divmod(milliseconds, 60_000)
    hours, minutes = divmod(minutes, 60)
    return f"{hours:02}:{minutes:02}:{milliseconds // 1000:02}{point}{milliseconds % 1000:03}"
