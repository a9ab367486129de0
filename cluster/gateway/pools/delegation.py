"""Calls of applications on behalf of the sender of a task.

The router gives an application the sender's identity in a header. The application returns it with
each call, and the router that gets the call applies the sender's rights and limits. Only peers on
links can do that: they have the cluster's secret, and can send requests without a tenant as well.
"""

from base64 import urlsafe_b64decode, urlsafe_b64encode
from dataclasses import replace

import msgspec

from cluster.admission import OPEN, Identity
from cluster.errors import InvalidRequestError
from cluster.gateway.messages import Headers, header

CALLER_HEADER = b"x-tandem-caller"
"""Header with the identity of a task's sender."""
SHARED_SLOT_HEADER = b"x-tandem-shared-slot"
"""Header, of any value, of the one call of a task that uses its request's concurrent slot."""


GUARDS_HEADER = b"x-tandem-guards"
"""Header of a task's request that its calls must have, too."""


def caller_headers(headers: Headers, identity: Identity, priority: int) -> Headers:
    """Return the headers of a task for the application, from which ``read_caller`` restores it.

    Args:
        headers: Headers of the task's request.
        identity: Its sender.
        priority: Priority of its request, which its calls inherit.
    """
    sender = replace(identity, priority=priority, is_operator=False)
    guards = [pair for pair in headers if pair[0] == GUARDS_HEADER]
    return [(CALLER_HEADER, urlsafe_b64encode(msgspec.json.encode(sender))), *guards]


def read_caller(headers: Headers) -> Identity:
    """Return the identity of a request that arrived over a link.

    Raises:
        InvalidRequestError: The header is not one of a router.
    """
    value = header(headers, CALLER_HEADER)
    if value is None:
        return OPEN
    try:
        identity = msgspec.json.decode(urlsafe_b64decode(value), type=Identity)
    except (ValueError, msgspec.DecodeError) as error:
        name = CALLER_HEADER.decode()
        raise InvalidRequestError(f"Invalid header: {error}", param=name) from None
    has_own_slot = header(headers, SHARED_SLOT_HEADER) is None
    return replace(identity, is_delegated=True, has_own_slot=has_own_slot)
