"""The rules with every duration shortened alike: minutes of an alert in the seconds of a test.

Expressions and thresholds stay as they are; rates are per second in shorter windows, too.
"""

import re

_DURATION = re.compile(r"(\[|\boffset |\bfor: )(\d+)([smhd])")
_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


def hurried(rules: str, factor: float) -> str:
    """The text of a rule file whose windows, offsets and ``for`` are ``factor`` times shorter."""

    def shorten(found: re.Match[str]) -> str:
        before, number, unit = found.groups()
        return f"{before}{round(int(number) * _SECONDS[unit] / factor)}s"

    return _DURATION.sub(shorten, rules)
