"""HTML pages of the router: self-contained files that load nothing from elsewhere.

Scripts and styles are inline; the content security policy allows exactly these, by their hashes.
``/*vendor:FILE*/`` in a page is replaced by a third-party file from ``vendor``.
"""

import base64
import hashlib
import html
import re
from collections.abc import Iterable
from importlib import resources

from cluster.gateway.messages import Response, bytes_response

MODELS = "<!--models-->"
"""Placeholder in a page for the options of its model selection."""
_VENDORED = re.compile(r"/\*vendor:([\w.-]+)\*/")


class Page:
    """One page, loaded once.

    Args:
        name: File name without ``.html``.
    """

    def __init__(self, name: str) -> None:
        files = resources.files(__package__)
        vendor = files / "vendor"
        self._text = _VENDORED.sub(
            lambda match: (vendor / match[1]).read_text(encoding="utf-8"),
            (files / f"{name}.html").read_text(encoding="utf-8"),
        )
        self._policy = _policy(self._text)

    def response(self, models: Iterable[str]) -> Response:
        """Return the page with these models in its selection."""
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
    contents = re.findall(rf"<{tag}>(.*?)</{tag}>", text, re.DOTALL)
    digests = (hashlib.sha256(content.encode()).digest() for content in contents)
    return " ".join(f"'sha256-{base64.b64encode(digest).decode()}'" for digest in digests)
