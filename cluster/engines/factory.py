"""Construction of the engine that a generator's configuration selects."""

from collections.abc import Callable
from pathlib import Path

from cluster.config import GeneratorConfig
from cluster.engines.base import Engine


def resolve_model(name: str) -> str:
    """Return the model's directory in the model store, or its Hugging Face id."""
    from cluster.models import store

    return store.resolve(name)


def make_generator_engine(
    config: GeneratorConfig,
    resolve: Callable[[str], Path | str] = resolve_model,
    *,
    ray_metrics: bool = False,
    traces_endpoint: str | None = None,
) -> Engine:
    """Return the engine for ``config``, not started; see ``VllmEngine`` for the other arguments.

    Raises:
        ConfigError: The model does not exist.
    """
    # Only the selected engine is imported.
    if config.engine == "sim":
        from cluster.engines.sim import SimEngine

        return SimEngine(config)
    from cluster.engines.vllm.engine import VllmEngine

    return VllmEngine(
        config,
        str(resolve(config.model)),
        lambda path: str(resolve(path)),
        ray_metrics=ray_metrics,
        traces_endpoint=traces_endpoint,
    )
