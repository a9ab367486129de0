"""A request over Ray Serve's handle, read as one over a link is.

Far slower than a link (each item crosses Ray's object plane), but it works wherever Ray does.
"""

from collections.abc import AsyncIterator
from typing import Any

from cluster.errors import LinkClosedError, RequestError
from cluster.link import ResponseHead
from cluster.usage import Usage

Item = ResponseHead | bytes | Usage
"""What the other end yields for one request: its head, its chunks, and at last what it took."""


class HandleAnswer:
    """The answer to a streaming call of a handle; like ``cluster.link.ClientStream``."""

    def __init__(self, items: Any) -> None:
        self.usage: Usage | None = None
        self._items = items
        self._iterator: AsyncIterator[Item] = aiter(items)

    async def head(self) -> ResponseHead:
        """The response's head; see ``ClientStream.head``."""
        head = await self._next()
        assert isinstance(head, ResponseHead)
        return head

    async def read(self) -> bytes:
        """The next chunk; b"" at the end."""
        while not isinstance(item := await self._next(), bytes):
            if item is None:
                return b""
            if isinstance(item, Usage):
                self.usage = item
        return item

    def cancel(self) -> None:
        """End the work at the other end."""
        self._items.cancel()

    async def _next(self) -> Item | None:
        from ray.exceptions import RayError, RayTaskError
        from ray.serve.exceptions import RayServeException

        try:
            return await anext(self._iterator)
        except StopAsyncIteration:
            return None
        except RayTaskError as error:
            if isinstance(error.cause, RequestError):
                raise error.cause from error
            raise LinkClosedError(f"the other end failed: {error.cause}") from error
        except (RayError, RayServeException) as error:
            reason = str(error).splitlines()[0]
            raise LinkClosedError(f"{type(error).__name__}: {reason}") from error
