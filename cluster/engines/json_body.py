"""JSON bodies of requests, read equally strictly by all engines."""

from typing import Any

import msgspec

from cluster.errors import InvalidRequestError


def decode_json(body: bytes) -> Any:
    """Decode a body.

    Raises:
        InvalidRequestError: It is not JSON. Python's own parser would accept text that is not
            UTF-8, and numbers that become infinite.
    """
    try:
        return msgspec.json.decode(body)
    except (ValueError, RecursionError) as error:  # all of msgspec's and Unicode's
        raise InvalidRequestError(f"The request body is not valid JSON: {error}") from None
