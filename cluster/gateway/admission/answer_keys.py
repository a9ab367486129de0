"""Idempotency keys of requests: hashes that name an answer, and one request of a key at a time.

The header is that of draft-ietf-httpapi-idempotency-key-header-07; with the same key, another
request gets status 422, as the draft recommends. Its value is an opaque string here.
"""

import asyncio
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from hashlib import blake2b
from weakref import WeakValueDictionary

from cluster.config import IdempotencyConfig
from cluster.errors import InvalidRequestError, RequestTimeoutError, UnprocessableError
from cluster.gateway.messages import Request, header
from cluster.gateway.pools.pool import Pool
from cluster.link import CONFLICT, AnswerKey
from cluster.link.frames import ANSWER_ID_BYTES

KEY_HEADER = b"idempotency-key"
MAX_KEY_CHARS = 255
_THREAD_BYTES = 256 * 1024
"""Size of a body from which a thread hashes it; the event loop would stop for 0.2 ms or more."""


class AnswerKeys:
    """Idempotency keys of one router's requests."""

    def __init__(self, config: IdempotencyConfig) -> None:
        self.config = config
        """Settings; may be replaced."""
        self._locks: WeakValueDictionary[bytes, asyncio.Lock] = WeakValueDictionary()

    async def read(self, request: Request) -> AnswerKey | None:
        """Return the key of a request; None if it has none.

        Raises:
            InvalidRequestError: The key is too long, or not printable ASCII.
        """
        value = header(request.headers, KEY_HEADER)
        if value is None or not self.config.keep_s or request.method != "POST":
            return None
        if not 0 < len(value) <= MAX_KEY_CHARS or not (value.isascii() and value.isprintable()):
            raise InvalidRequestError(
                f"`Idempotency-Key` must have 1 to {MAX_KEY_CHARS} printable ASCII characters.",
                param="Idempotency-Key",
            )
        id_ = _hash(request.tenant.encode(), value.encode())
        path, model = request.path.encode(), (request.model or "").encode()
        parts = (path, model, request.query, request.body)
        if len(request.body) > _THREAD_BYTES:
            fingerprint = await asyncio.to_thread(_hash, *parts)
        else:
            fingerprint = _hash(*parts)
        return AnswerKey(id_, fingerprint)

    @asynccontextmanager
    async def turn(self, key: AnswerKey, timeout_s: float | None) -> AsyncIterator[None]:
        """Wait until the answer to an earlier request with this key, if any, has begun.

        Raises:
            RequestTimeoutError: The client's timeout ended first.
        """
        lock = self._locks.get(key.id)
        if lock is None:
            lock = self._locks[key.id] = asyncio.Lock()
        try:
            async with asyncio.timeout(timeout_s):
                await lock.acquire()
        except TimeoutError:
            raise RequestTimeoutError(
                "An earlier request with this `Idempotency-Key` has no answer yet."
            ) from None
        try:
            yield
        finally:
            lock.release()


def find_answer(key: AnswerKey, own: Iterable[Pool], pools: Iterable[Pool]) -> str | None:
    """Return the replica of the request's own pools that has the answer of a key, if any.

    Raises:
        UnprocessableError: The answer is that of a request to another pool.
    """
    for pool in own:
        if (replica := pool.replicas.find_answer(key.id)) is not None:
            return replica
    if any(other.replicas.find_answer(key.id) is not None for other in pools):
        raise UnprocessableError(CONFLICT)
    return None


def _hash(*parts: bytes) -> bytes:
    digest = blake2b(digest_size=ANSWER_ID_BYTES)
    for part in parts:
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return digest.digest()
