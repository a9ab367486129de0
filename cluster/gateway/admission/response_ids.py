"""Ids of stored responses (``/v1/responses/{id}``), which only their tenant may use.

vLLM takes the id of a response from the request's ``request_id``. The router sets it to a random
part, or the idempotency key's hash, and a MAC over that part and the tenant, so any router can tell
who created a response without remembering it.
"""

import hmac
from secrets import token_hex

from cluster.errors import NotFoundError
from cluster.gateway.messages import Request
from cluster.routing import RequestBody

CREATE_PATH = "/v1/responses"
_PREFIX = "resp_"
_OTHER_PATHS = ("render", "input_tokens")  # have no id
_RANDOM_CHARS = _TAG_CHARS = 32


class ResponseIds:
    """Ids that name their tenant. Without API keys there is one tenant, and nothing is checked.

    Args:
        key: Key of the MACs, the same for all routers of a cluster.
    """

    def __init__(self, key: bytes) -> None:
        self._key = key

    def new_id(self, request: Request) -> str | None:
        """Return an id for the response that the request creates; None if it creates none.

        It is the same for all requests with one idempotency key, since they share the response.
        """
        if not request.tenant or request.path != CREATE_PATH or request.method != "POST":
            return None
        key = request.answer_key
        random = token_hex(_RANDOM_CHARS // 2) if key is None else key.id.hex()
        return _PREFIX + random + self._tag(request, random)

    def check(self, request: Request, body: RequestBody) -> None:
        """Raise if the request refers to a response of another tenant.

        Raises:
            NotFoundError: The same error as for an id that does not exist.
        """
        if not request.tenant or not request.path.startswith(CREATE_PATH):
            return
        id_ = request.path.removeprefix(CREATE_PATH).removeprefix("/").partition("/")[0]
        if id_ and id_ not in _OTHER_PATHS:
            self._check(request, id_)
        if isinstance(body.previous_response_id, str):
            self._check(request, body.previous_response_id)

    def _check(self, request: Request, id_: str) -> None:
        random, tag = id_[len(_PREFIX) : -_TAG_CHARS], id_[-_TAG_CHARS:]
        is_own = hmac.compare_digest(tag.encode(), self._tag(request, random).encode())
        if not (is_own and id_.startswith(_PREFIX)):
            raise NotFoundError(f"Response with id '{id_}' not found.", param="response_id")

    def _tag(self, request: Request, random: str) -> str:
        message = f"{random} {request.tenant}".encode()
        return hmac.digest(self._key, message, "sha256").hex()[:_TAG_CHARS]
