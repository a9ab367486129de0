"""Selection of the pool for a request, by model and path."""

from collections.abc import Iterable, Mapping

from cluster.config.applications import is_application_path
from cluster.engines.base import UNSPECIFIED_MODEL
from cluster.errors import InvalidRequestError, NotFoundError
from cluster.gateway.pools.pool import Pool, PoolKind
from cluster.routing import RequestBody

MODEL_PREFIX = "/models/"
TOKENIZER_PATHS = ("/tokenize", "/detokenize")


def split_model_path(pools: Mapping[str, Pool], path: str) -> tuple[str, str | None]:
    """Return the path behind ``/models/{model}`` of a classifier, and the model.

    Clients that send no ``model`` name it thus by their base URL. Other paths are returned as they
    are. Names may contain slashes; the longest one that matches wins.
    """
    if not path.startswith(MODEL_PREFIX):
        return path, None
    rest = path.removeprefix(MODEL_PREFIX)
    names = [name for pool in pools.values() if pool.kind == "classifier" for name in pool.models]
    matching = [name for name in names if rest == name or rest.startswith(f"{name}/")]
    if not matching:
        return path, None
    model = max(matching, key=len)
    return rest[len(model) :] or "/", model


def select_pool(
    pools: Mapping[str, Pool], path: str, body: RequestBody, path_model: str | None = None
) -> Pool:
    """Return the pool that answers ``path`` for the model that the body or the path names.

    A pool without replicas may serve every path of its kind. The request then waits for a replica,
    whose engine answers 404 if necessary.

    Raises:
        NotFoundError: The model does not exist, or no pool has the path.
        InvalidRequestError: The model does not serve the path, or must be named; or body and path
            name different ones.
    """
    if is_application_path(path):  # its `model` is the one that the application calls
        return _application_pool(pools, path)
    if body.model == UNSPECIFIED_MODEL:
        body.model = None
    if path_model is not None and body.model not in (None, path_model):
        raise InvalidRequestError(
            f"The path names the model `{path_model}`, the body another one.", param="model"
        )
    model = path_model or body.model
    if model is not None:
        return _select_by_model(pools, path, model)
    candidates = _pools_with(pools, path)
    kind = _kind_meant(path, body)
    candidates = [pool for pool in candidates if pool.kind == kind] or candidates
    if len(candidates) > 1:
        names = _model_names(candidates)
        raise InvalidRequestError(
            f"Several models serve {path}; set `model` to one of: {names}"
            + (f". Or post to {MODEL_PREFIX}MODEL{path}" if kind == "classifier" else ""),
            param="model",
        )
    return candidates[0]


def _application_pool(pools: Mapping[str, Pool], path: str) -> Pool:
    if all(pool.kind != "application" for pool in pools.values()):
        raise NotFoundError(
            f"{path} needs applications, which are not configured. Add `applications: {{}}`."
        )
    return _pools_with(pools, path)[0]


def _kind_meant(path: str, body: RequestBody) -> PoolKind:
    """Return the kind of pool that a request without a model means on a path of both kinds."""
    # `inputs` is the field of text-embeddings-inference.
    is_vllms = path in TOKENIZER_PATHS and not getattr(body, "inputs", b"")
    return "generator" if is_vllms else "classifier"


def find_pool(pools: Mapping[str, Pool], model: str) -> Pool | None:
    """Return the pool that has a model by this name; None without one."""
    pool = pools.get(model)
    if pool is None or model not in pool.models:
        pool = next((p for p in pools.values() if model in p.models), None)
    return pool


def _select_by_model(pools: Mapping[str, Pool], path: str, model: str) -> Pool:
    pool = find_pool(pools, model)
    if pool is None:
        raise NotFoundError(
            f"The model `{model}` does not exist. Known models: {_model_names(pools.values())}",
            param="model",
        )
    if pool.serves(path) is False:
        names = _model_names(_pools_with(pools, path))
        raise InvalidRequestError(
            f"The model `{model}` does not serve {path}. Models that do: {names}",
            param="model",
        )
    return pool


def _pools_with(pools: Mapping[str, Pool], path: str) -> list[Pool]:
    """Return the pools that serve a path, or those that may if none does.

    Raises:
        NotFoundError: No pool has the path.
    """
    candidates = [pool for pool in pools.values() if pool.serves(path)]
    if not candidates:
        candidates = [pool for pool in pools.values() if pool.serves(path) is None]
    if not candidates:
        raise NotFoundError(f"No such path: {path}. GET /openapi.json lists all paths.")
    return candidates


def _model_names(pools: Iterable[Pool]) -> str:
    return ", ".join(sorted(name for pool in pools for name in pool.models))
