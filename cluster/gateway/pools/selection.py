"""Selection of the pool for a request, by model and path."""

from collections.abc import Iterable, Mapping

from cluster.errors import InvalidRequestError, NotFoundError
from cluster.gateway.pools.pool import Pool


def select_pool(pools: Mapping[str, Pool], path: str, model: str | None) -> Pool:
    """Return the pool that answers ``path`` for ``model``.

    A pool is assumed to serve every path until one of its replicas has described itself. The
    request then waits for a replica, whose engine answers 404 if necessary.

    Raises:
        NotFoundError: The model does not exist, or no pool has the path.
        InvalidRequestError: The model does not serve the path, or must be named.
    """
    if model is not None:
        return _select_by_model(pools, path, model)
    candidates = [pool for pool in pools.values() if pool.serves(path)]
    if not candidates:
        candidates = [pool for pool in pools.values() if pool.serves(path) is None]
    if not candidates:
        raise _no_such_path(path)
    # Both kinds can serve embeddings; without a model, a classifier is more likely meant.
    classifiers = [pool for pool in candidates if pool.kind == "classifier"]
    if classifiers and path == "/v1/embeddings":
        candidates = classifiers
    if len(candidates) > 1:
        raise InvalidRequestError(
            f"Several models serve {path}; set `model` to one of: {_model_names(candidates)}",
            param="model",
        )
    return candidates[0]


def _select_by_model(pools: Mapping[str, Pool], path: str, model: str) -> Pool:
    pool = pools.get(model) or next((p for p in pools.values() if model in p.models), None)
    if pool is None:
        raise NotFoundError(
            f"The model `{model}` does not exist. Known models: {_model_names(pools.values())}",
            param="model",
        )
    if pool.serves(path) is False:
        candidates = [other for other in pools.values() if other.serves(path)]
        if not candidates:
            raise _no_such_path(path)
        raise InvalidRequestError(
            f"The model `{model}` does not serve {path}. Models that do: "
            f"{_model_names(candidates)}",
            param="model",
        )
    return pool


def _model_names(pools: Iterable[Pool]) -> str:
    return ", ".join(sorted(name for pool in pools for name in pool.models))


def _no_such_path(path: str) -> NotFoundError:
    return NotFoundError(f"No such path: {path}. GET /openapi.json lists all paths.")
