"""The router's own pages: one self-contained HTML file each, which fetches nothing from elsewhere.

A page's scripts and styles stand in it, and its security policy allows just those, by their hash.
``/*vendor:FILE*/`` in a page stands for a file of others' below ``vendor``.
"""

import base64
import hashlib
import html
import re
from collections.abc import Iterable
from importlib import resources

from cluster.gateway.messages import Response, bytes_response

MODELS = "<!--models-->"
"""Where a page wants its choice of models."""
_VENDORED = re.compile(r"/\*vendor:([\w.-]+)\*/")


class Page:
    """One page, read once.

    Args:
        name: Its file, without the ending.
    """

    def __init__(self, name: str) -> None:
        files = resources.files(__package__)
        vendor = files / "vendor"
        self._text = _VENDORED.sub(
            lambda found: (vendor / found[1]).read_text(encoding="utf-8"),
            (files / f"{name}.html").read_text(encoding="utf-8"),
        )
        self._policy = _policy(self._text)

    def response(self, models: Iterable[str]) -> Response:
        """The page with these models to choose from."""
        options = "".join(f"<option>{html.escape(name)}</option>" for name in models)
        headers = [
            (b"content-security-policy", self._policy),
            (b"cache-control", b"no-cache"),
            (b"x-content-type-options", b"nosniff"),
            (b"referrer-policy", b"no-referrer"),
        ]
        body = self._text.replace(MODELS, options).encode()
        return bytes_response(200, b"text/html; charset=utf-8", body, headers)


def _policy(text: str) -> bytes:
    scripts, styles = (_hashes(text, tag) for tag in ("script", "style"))
    return (
        f"default-src 'none'; script-src {scripts}; style-src {styles}; connect-src 'self'; "
        "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ).encode()


def _hashes(text: str, tag: str) -> str:
    found = re.findall(rf"<{tag}>(.*?)</{tag}>", text, re.DOTALL)
    digests = (hashlib.sha256(inside.encode()).digest() for inside in found)
    return " ".join(f"'sha256-{base64.b64encode(digest).decode()}'" for digest in digests)
