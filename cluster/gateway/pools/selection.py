"""Which pool a request goes to: its ``model`` field, its path, and what the pools serve."""

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from cluster.errors import InvalidRequestError, NotFoundError
from cluster.gateway.messages import Request, header
from cluster.gateway.pools.pool import Pool


class Envelope(msgspec.Struct, frozen=True):
    """The fields of a body that the router needs; decoding skips the rest.

    All but ``model`` may hold anything: what is wrong with them, the engine says.
    """

    model: str | None = None
    max_tokens: Any = None
    max_completion_tokens: Any = None
    max_output_tokens: Any = None
    n: Any = None
    priority: Any = None
    stream: Any = None

    @property
    def most_tokens(self) -> float | None:
        """Tokens that the completions may have together; None where the body does not say."""
        for most in (self.max_completion_tokens, self.max_tokens, self.max_output_tokens):
            if _is_count(most):
                return float(most * (self.n if _is_count(self.n) else 1))
        return None


_EMPTY = Envelope()
UNREAD = Envelope()
"""Of a body that is not JSON: what it names is not known."""
_decode = msgspec.json.Decoder(Envelope).decode


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and 0 < value < 2**31


def read_envelope(request: Request) -> Envelope:
    """What the router reads of the body; empty where there is none, ``UNREAD`` where it is no JSON.

    Raises:
        InvalidRequestError: the body is not a JSON object, or ``model`` is not a string.
    """
    if not request.body:
        return _EMPTY
    if not _is_json(request):
        return UNREAD
    try:
        return _decode(request.body)
    except msgspec.ValidationError as error:
        raise InvalidRequestError(f"The request body is wrong: {error}", param="model") from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise InvalidRequestError(f"The request body is not valid JSON: {error}") from None


def _is_json(request: Request) -> bool:
    """Whether engines read the body as JSON."""
    content_type = (header(request.headers, b"content-type") or "json").lower()
    return "json" in content_type or "text/plain" in content_type


def select_pool(pools: Mapping[str, Pool], path: str, model: str | None) -> Pool:
    """The pool that answers ``path`` for ``model``.

    A pool of which no replica has described itself yet is taken to serve every path: the request
    then waits for the replica, whose engine answers 404 itself.

    Raises:
        NotFoundError: no such model, or no pool has the path.
        InvalidRequestError: the model does not do what the path asks for, or must be named.
    """
    if model is not None:
        return _named(pools, path, model)
    able = [pool for pool in pools.values() if pool.serves(path)]
    if not able:
        able = [pool for pool in pools.values() if pool.serves(path) is None]
    if not able:
        raise _no_such_path(path)
    # Embeddings come from either kind; where the model is left out, an encoder is what is meant.
    encoders = [pool for pool in able if pool.kind == "classifier"]
    able = encoders if encoders and path == "/v1/embeddings" else able
    if len(able) > 1:
        raise InvalidRequestError(
            f"Several models serve {path}; name one in 'model': {_known(able)}", param="model"
        )
    return able[0]


def _named(pools: Mapping[str, Pool], path: str, model: str) -> Pool:
    pool = pools.get(model) or next((p for p in pools.values() if model in p.models), None)
    if pool is None:
        raise NotFoundError(
            f"The model `{model}` does not exist. Known models: {_known(list(pools.values()))}",
            param="model",
        )
    if pool.serves(path) is False:
        able = [other for other in pools.values() if other.serves(path)]
        if not able:
            raise _no_such_path(path)
        raise InvalidRequestError(
            f"The model `{model}` does not serve {path}. Models that do: {_known(able)}",
            param="model",
        )
    return pool


def _known(pools: Sequence[Pool]) -> str:
    return ", ".join(sorted(name for pool in pools for name in pool.models))


def _no_such_path(path: str) -> NotFoundError:
    return NotFoundError(f"No such path: {path}. GET /openapi.json lists what there is.")
