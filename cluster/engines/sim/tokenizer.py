"""Tokenizer without a vocabulary file.

A token is a piece of at most four ASCII characters, a leading space included; its id is those bytes
as an integer. All replicas get the same ids, ``decode`` needs no table, and texts with a common
start (up to white space) have common first ids. Ids are below 2**31.
"""

import re
import sys
import zlib
from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

END_OF_TEXT = 0
MESSAGE_START = 0x81
MESSAGE_END = 0x82
_SPECIAL = {END_OF_TEXT: "<|endoftext|>", MESSAGE_START: "<|im_start|>", MESSAGE_END: "<|im_end|>"}
_CODE_POINT = 0x80  # lowest byte of the ids of non-ASCII characters

_PIECE = re.compile(r" \S{0,3}|\S{1,4}|\s", re.ASCII)  # ASCII: the same white space as in bytes
_PIECE_BYTES = re.compile(rb" \S{0,3}|\S{1,4}|\s")

# Words that the engine generates: " bak", " bal", ...; each is one token.
_WORDS = [f" {a}{b}{c}" for a in "bdfghjklmnprstvw" for b in "aeiou" for c in "klmnprst"]
WORD_IDS = [int.from_bytes(word.encode()) for word in _WORDS]
_FIRST_OF_LENGTH = np.array([1, 1 << 8, 1 << 16, 1 << 24], np.uint32)
_ID_BYTES = [word.to_bytes(8) for word in WORD_IDS]


def encode(text: str) -> list[int]:
    """Return the token ids of ``text``; special tokens in it count as plain text."""
    if text.isascii() and "\0" not in text:
        return [int.from_bytes(piece) for piece in _PIECE_BYTES.findall(text.encode())]
    ids: list[int] = []
    for piece in _PIECE.findall(text):
        if piece.isascii() and "\0" not in piece:
            ids.append(int.from_bytes(piece.encode()))
        else:
            ids.extend(_CODE_POINT | ord(character) << 8 for character in piece)
    return ids


def decode(ids: Iterable[int]) -> str:
    """Return the text of ``ids``; unknown ids give no text."""
    return "".join(map(piece_of, ids))


def piece_of(token_id: int) -> str:
    if token_id in _SPECIAL:
        return _SPECIAL[token_id]
    if token_id & 0xFF == _CODE_POINT and token_id >> 8 <= sys.maxunicode:
        return chr(token_id >> 8)
    piece = token_id.to_bytes((token_id.bit_length() + 7) // 8)
    return piece.decode("ascii") if len(piece) <= 4 and piece.isascii() else ""


def byte_lengths(ids: NDArray[np.uint32]) -> NDArray[np.int64]:
    """Return the length of each token's text in bytes of UTF-8."""
    lengths = np.searchsorted(_FIRST_OF_LENGTH, ids, side="right")
    odd = np.flatnonzero(ids & 0x80)  # not an ASCII piece
    codes = ids[odd] >> 8
    character_bytes = 1 + (codes > 0x7F) + (codes > 0x7FF) + (codes > 0xFFFF)
    lengths[odd] = np.where(ids[odd] & 0xFF == _CODE_POINT, character_bytes, 0)
    return lengths


def encode_chat(messages: Sequence[tuple[str, str]], add_generation_prompt: bool) -> list[int]:
    """Return the ids of (role, content) messages in the ChatML template."""
    ids: list[int] = []
    for role, content in messages:
        ids += [MESSAGE_START, *encode(f"{role}\n{content}"), MESSAGE_END, *encode("\n")]
    if add_generation_prompt:
        ids += [MESSAGE_START, *encode("assistant\n")]
    return ids


def digest(ids: Sequence[int], seed: int) -> int:
    """Return the initial state of ``next_word`` after a prompt."""
    return zlib.crc32(b"".join([token.to_bytes(8) for token in ids]), seed & 0xFFFFFFFF)


def next_word(state: int) -> tuple[int, int]:
    """Return the next word (an index into ``WORD_IDS``) and the new state.

    The word depends only on the tokens before it, so a partial completion sent again as part of a
    prompt continues as before.
    """
    word = (state ^ state >> 16) % len(_WORDS)
    return word, zlib.crc32(_ID_BYTES[word], state)
