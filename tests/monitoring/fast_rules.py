"""Alert rules with all durations divided by a factor, so that they fire within a test.

Thresholds need no change: rates are per second in shorter windows, too.
"""

import re

_DURATION = re.compile(r"(\[|\boffset |\bfor: )(\d+)([smhd])")
_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


def speed_up(rules: str, factor: float) -> str:
    """Return a rule file with windows, offsets and ``for`` divided by ``factor``."""

    def shorten(match: re.Match[str]) -> str:
        before, number, unit = match.groups()
        return f"{before}{round(int(number) * _SECONDS[unit] / factor)}s"

    return _DURATION.sub(shorten, rules)
