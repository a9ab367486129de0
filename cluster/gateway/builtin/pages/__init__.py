"""HTML pages of the router: self-contained files that load nothing from elsewhere.

Scripts and styles are inline; the content security policy allows exactly these, by their hashes.
``/*include:FILE*/`` or ``<!--include:FILE-->`` in a page is replaced by a file: by one that pages
share, or by a third-party one from ``vendor``.
"""

import base64
import hashlib
import html
import re
from collections.abc import Awaitable, Callable, Iterable, Mapping
from functools import partial
from importlib import resources

from cluster.config import AUTO
from cluster.gateway.messages import Request, Response, bytes_response
from cluster.gateway.pools.pool import Pool

NAMES = ("dashboard", "explain", "playground")
CHAT_PATH, SPEECH_PATH = "/v1/chat/completions", "/v1/audio/transcriptions"
_INCLUDED = re.compile(r"(?:/\*|<!--)include:([\w./-]+)(?:\*/|-->)")


class Pages:
    """Pages and their handlers.

    Args:
        pools: Pools by name.
        has_auto: Returns True if clients may send `model: auto`.
    """

    def __init__(self, pools: Mapping[str, Pool], has_auto: Callable[[], bool]) -> None:
        self._pools = pools
        self._has_auto = has_auto
        self.handlers: dict[str, Callable[[Request], Awaitable[Response]]] = {
            f"/{name}": partial(self._show, Page(name)) for name in NAMES
        }
        """Handlers by path."""

    async def _show(self, page: "Page", _request: Request) -> Response:
        pools = self._pools.values()
        generators = [
            name
            for pool in pools
            if pool.kind == "generator" and pool.serves(CHAT_PATH) is not False
            for name in (pool.name, *pool.limits.adapters)
        ]
        if self._has_auto():
            generators.append(AUTO)
        classifiers = [pool.name for pool in pools if pool.kind == "classifier"]
        applications = [pool.name for pool in pools if pool.kind == "application"]
        speech = [pool.name for pool in pools if pool.serves(SPEECH_PATH)]
        return page.response(
            {
                "pools": self._pools,
                "generators": generators,
                "classifiers": classifiers,
                "applications": applications,
                "speech": speech,
            }
        )


class Page:
    """One page, loaded once.

    Args:
        name: File name without ``.html``.
    """

    def __init__(self, name: str) -> None:
        self._text = _INCLUDED.sub(lambda match: _read(match[1]), _read(f"{name}.html"))
        self._policy = _policy(self._text)

    def response(self, models: Mapping[str, Iterable[str]]) -> Response:
        """Return the page with models in its selections.

        Args:
            models: Names by placeholder: ``pools`` replace ``<!--pools-->``.
        """
        text = self._text
        for placeholder, names in models.items():
            options = "".join(f"<option>{html.escape(name)}</option>" for name in names)
            text = text.replace(f"<!--{placeholder}-->", options)
        headers = [
            (b"content-security-policy", self._policy),
            (b"cache-control", b"no-cache"),
            (b"x-content-type-options", b"nosniff"),
            (b"referrer-policy", b"no-referrer"),
        ]
        return bytes_response(200, b"text/html; charset=utf-8", text.encode(), headers)


def _read(name: str) -> str:
    return (resources.files(__package__) / name).read_text(encoding="utf-8")


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
