"""Search for personal data, placeholders, and the texts of a request. Pure: no I/O, no clock.

patterns      cards, IBANs, e-mail addresses and phone numbers, also at the end of a growing text
placeholders  numbered placeholders and the values that they stand for
texts         the texts of a JSON body
"""

from cluster.guards.patterns import CONTEXT_CHARS, MAX_OPEN_CHARS, Span, before_spans, find_patterns
from cluster.guards.placeholders import Placeholders, TooManyValuesError
from cluster.guards.texts import DocumentTexts, TextSlot, find_texts, remove_fields

__all__ = [
    "CONTEXT_CHARS",
    "MAX_OPEN_CHARS",
    "DocumentTexts",
    "Placeholders",
    "Span",
    "TextSlot",
    "TooManyValuesError",
    "before_spans",
    "find_patterns",
    "find_texts",
    "remove_fields",
]
