"""Names of languages for prompts, and detection of a text's language."""

from cluster.errors import InvalidRequestError

# fmt: off
_NAMES = {
    "ar": "Arabic", "bg": "Bulgarian", "bn": "Bengali", "ca": "Catalan", "cs": "Czech",
    "da": "Danish", "de": "German", "el": "Greek", "en": "English", "es": "Spanish",
    "et": "Estonian", "eu": "Basque", "fa": "Persian", "fi": "Finnish", "fr": "French",
    "ga": "Irish", "gl": "Galician", "gu": "Gujarati", "he": "Hebrew", "hi": "Hindi",
    "hr": "Croatian", "hu": "Hungarian", "hy": "Armenian", "id": "Indonesian", "is": "Icelandic",
    "it": "Italian", "ja": "Japanese", "ka": "Georgian", "kk": "Kazakh", "ko": "Korean",
    "la": "Latin", "lt": "Lithuanian", "lv": "Latvian", "mk": "Macedonian", "mr": "Marathi",
    "ms": "Malay", "nb": "Norwegian Bokmål", "nl": "Dutch", "nn": "Norwegian Nynorsk",
    "no": "Norwegian",
    "pa": "Punjabi", "pl": "Polish", "pt": "Portuguese", "ro": "Romanian", "ru": "Russian",
    "sk": "Slovak", "sl": "Slovenian", "sq": "Albanian", "sr": "Serbian", "sv": "Swedish",
    "sw": "Swahili", "ta": "Tamil", "te": "Telugu", "th": "Thai", "tl": "Tagalog", "tr": "Turkish",
    "uk": "Ukrainian", "ur": "Urdu", "vi": "Vietnamese", "zh": "Chinese",
}
# fmt: on
DETECTED_CHARS = 2000
"""Part of a text, from its first letter, from which its language is detected."""


def name_of(tag: str) -> str:
    """Return the English name of a BCP 47 tag, such as `Portuguese (BR)`; else the tag."""
    language, _, rest = tag.partition("-")
    name = _NAMES.get(language.lower())
    if name is None:
        return tag
    return f"{name} ({rest})" if rest else name


def detect(text: str) -> str:
    """Return the tag of a text's language. Takes milliseconds, and a second at first.

    Raises:
        InvalidRequestError: The text has no letters.
    """
    start = next((index for index, char in enumerate(text) if char.isalpha()), None)
    if start is None:
        raise InvalidRequestError(
            "The language of the text cannot be detected; set `source`.", param="source"
        )
    # Imported by the first detection, because its model takes memory and a second.
    from py3langid import classify

    return str(classify(text[start : start + DETECTED_CHARS])[0])
