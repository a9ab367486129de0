"""Patterns of personal data: payment cards, IBANs, e-mail addresses, phone numbers.

Numbers count only if their checksum is right: Luhn's (ISO/IEC 7812) for cards, ISO 7064 mod 97-10
for IBANs. Phone numbers have none; they need an international prefix, an assigned country code and
the length of E.164. Every pattern has a longest match, so a stream holds back little text.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import regex

from cluster.config import PatternName

MAX_OPEN_CHARS = 512
"""Most characters at the end of a text that ``find_patterns`` calls open: an e-mail address has up
to 64 + 1 + 5 * 64, and the character behind a match decides."""

CONTEXT_CHARS = 2
"""Characters in front of a match that decide whether it is one."""
_CONCURRENT_CHARS = 64 * 1024  # from here on, a search releases the interpreter's lock
_LOOKAHEAD = 3  # characters behind a match that decide: two separators and a digit


class Span(NamedTuple):
    """Characters of a text from ``start`` up to ``end`` that match."""

    start: int
    end: int
    label: str
    score: float = 1.0


# ISO 13616 registry (SWIFT, release 99): length by country.
_IBAN_LENGTHS: Mapping[str, int] = {
    code: length
    for length, codes in {
        15: "NO", 16: "BE", 18: "DK FI FK FO GL NL SD", 19: "MK SI", 20: "AT BA EE KZ LT LU MN XK",
        21: "CH HR LI LV", 22: "BG BH CR DE GB GE IE ME RS VA", 23: "AE GI IL IQ OM SO TL",
        24: "AD CZ ES MD PK RO SA SE SK TN VG", 25: "LY PT ST", 26: "IS TR", 
        27: "BI DJ FR GR IT MC MR SM", 28: "AL AZ BY CY DO GT HN HU LB NI PL SV",
        29: "BR EG PS QA UA", 30: "JO KW MU YE", 31: "MT SC", 32: "LC", 33: "RU",
    }.items()
    for code in codes.split()
}  # fmt: skip

# ITU-T E.164, list of assigned country codes (2016-11-15 and its amendments).
_COUNTRY_CODES_TEXT = (
    "1 7 20 27 30 31 32 33 34 36 39 40 41 43 44 45 46 47 48 49 51 52 53 54 55 56 57 58 60 61 62 63"
    " 64 65 66 81 82 84 86 90 91 92 93 94 95 98 211 212 213 216 218 220 221 222 223 224 225 226 227"
    " 228 229 230 231 232 233 234 235 236 237 238 239 240 241 242 243 244 245 246 247 248 249 250"
    " 251 252 253 254 255 256 257 258 260 261 262 263 264 265 266 267 268 269 290 291 297 298 299"
    " 350 351 352 353 354 355 356 357 358 359 370 371 372 373 374 375 376 377 378 379 380 381 382"
    " 383 385 386 387 389 420 421 423 500 501 502 503 504 505 506 507 508 509 590 591 592 593 594"
    " 595 596 597 598 599 670 672 673 674 675 676 677 678 679 680 681 682 683 685 686 687 688 689"
    " 690 691 692 800 808 850 852 853 855 856 870 878 880 881 882 883 886 888 960 961 962 963 964"
    " 965 966 967 968 970 971 972 973 974 975 976 977 979 992 993 994 995 996 998"
)
_COUNTRY_CODES = frozenset(_COUNTRY_CODES_TEXT.split())


# ISO/IEC 7812: issuers' first digits, and the lengths of their numbers.
_CARD_LENGTHS: Mapping[str, range | tuple[int, ...]] = {
    **dict.fromkeys(("34", "37"), (15,)),
    **dict.fromkeys(("30", "36", "38", "39"), range(14, 20)),
    "35": range(16, 20),
    **{f"4{digit}": (13, 16, 19) for digit in range(10)},
    **dict.fromkeys(map(str, (*range(22, 28), *range(51, 56))), (16,)),
    **dict.fromkeys(map(str, (50, *range(56, 70))), range(13, 20)),
}


def _card_end(text: str, start: int, end: int) -> int | None:
    """Return the end of the longest card number in a run of digit groups, or None."""
    places = [place for place in range(start, end) if text[place].isdigit()]
    lengths = _CARD_LENGTHS.get(text[places[0]] + text[places[1]], ())
    for length in reversed(lengths):
        if length > len(places):
            continue
        card_end = places[length - 1] + 1
        is_whole = card_end == len(text) or not text[card_end].isdigit()
        if is_whole and _has_luhn_sum([int(text[place]) for place in places[:length]]):
            return card_end
    return None


def _has_luhn_sum(digits: list[int]) -> bool:
    if len(set(digits)) == 1:  # 0000 0000 0000 0000 has a right sum
        return False
    doubled = (sum(divmod(2 * digit, 10)) for digit in digits[-2::-2])
    return (sum(digits[-1::-2]) + sum(doubled)) % 10 == 0


def _iban_end(text: str, start: int, end: int) -> int | None:
    length = _IBAN_LENGTHS.get(text[start : start + 2].upper())
    if length is None:
        return None
    chars: list[str] = []
    for position in range(start, end):
        if text[position].isalnum():
            chars.append(text[position])
        if len(chars) == length:
            break
    else:
        return None
    if position + 1 < len(text) and text[position + 1].isalnum():
        return None
    moved = "".join([*chars[4:], *chars[:4]])
    number = "".join(str(int(char, 36)) for char in moved)
    return position + 1 if int(number) % 97 == 1 else None


def _email_end(_text: str, _start: int, end: int) -> int:
    return end


def _phone_end(text: str, start: int, end: int) -> int | None:
    number = text[start:end].replace("(0)", "")
    digits = "".join(char for char in number if char.isdigit())
    digits = digits if number[0] == "+" else digits[2:]  # behind 00
    code = next((digits[:n] for n in (1, 2, 3) if digits[:n] in _COUNTRY_CODES), None)
    if code is None:
        return None
    return end if 7 <= len(digits) <= 15 and len(digits) - len(code) >= 4 else None


class _Pattern(NamedTuple):
    label: str
    regex: "regex.Pattern[str]"
    end: Callable[[str, int, int], int | None]
    """Returns the end of the match at the start of what the expression found, or None."""


_DIGIT_GAP = r"[ \u00a0.\-]?"
_PATTERNS: Mapping[PatternName, _Pattern] = {
    "card": _Pattern(
        "CARD",
        regex.compile(rf"(?<![0-9])[2-6](?:{_DIGIT_GAP}[0-9]){{12,18}}"),
        _card_end,
    ),
    "iban": _Pattern(
        "IBAN",
        regex.compile(
            r"(?<![A-Za-z0-9])[A-Za-z]{2}[0-9]{2}(?:[ \u00a0\-]?[A-Za-z0-9]){11,30}"
        ),
        _iban_end,
    ),
    "email": _Pattern(
        "EMAIL",
        regex.compile(
            r"(?<![\w.%+\-])[\w.%+\-]{1,64}@[^\W_][\w\-]{0,62}(?:\.[^\W_][\w\-]{0,62}){1,4}"
        ),
        _email_end,
    ),
    "phone": _Pattern(
        "PHONE",
        regex.compile(
            r"(?<![\w+])(?:\+|(?<![0-9][ ])00)[1-9]"
            r"(?:[ \u00a0().\-/]{0,2}[0-9]){6,15}(?![0-9])"
        ),
        _phone_end,
    ),
}  # fmt: skip


def find_patterns(
    text: str, names: Iterable[PatternName], *, start: int = 0, is_final: bool = True
) -> tuple[list[Span], int]:
    """Return the matches of patterns in a text, and the end of the settled part.

    Args:
        text: The text. What is before ``start`` is only the context of the first match.
        names: Patterns to look for.
        start: Index of the first character that may belong to a match.
        is_final: False if the text may still grow.

    Returns:
        Matches in order, which may overlap if several patterns match; and the index from which more
        text may change the result. No match crosses it. It is the text's length if ``is_final``.
    """
    spans: list[Span] = []
    settled = len(text)
    for name in names:
        pattern, position = _PATTERNS[name], start
        while found := pattern.regex.search(
            text, position, partial=not is_final, concurrent=len(text) > _CONCURRENT_CHARS
        ):
            if not is_final and (found.partial or found.end() > len(text) - _LOOKAHEAD):
                settled = min(settled, found.start())
                break
            end = pattern.end(text, found.start(), found.end())
            if end is not None:
                spans.append(Span(found.start(), end, pattern.label))
            position = end or found.start() + 1
    settled = before_spans(spans, settled)
    return sorted(span for span in spans if span.end <= settled), settled


def before_spans(spans: Iterable[Span], settled: int) -> int:
    """Return ``settled``, or the start of a match that would cross it."""
    for span in sorted(spans, reverse=True):
        if span.start < settled < span.end:
            settled = span.start
    return settled
