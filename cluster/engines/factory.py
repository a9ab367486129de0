"""Makes the engine that a generator's configuration names, and imports no other."""

from collections.abc import Callable
from pathlib import Path

from cluster.config import GeneratorConfig
from cluster.engines.base import Engine


def resolve_model(name: str) -> str:
    """The directory of a model, or its Hugging Face id; from the model store."""
    from cluster.models import store

    return store.resolve(name)


def make_generator_engine(
    config: GeneratorConfig,
    resolve: Callable[[str], Path | str] = resolve_model,
    *,
    ray_metrics: bool = False,
    traces_endpoint: str | None = None,
) -> Engine:
    """The engine for ``config``, not yet started; the rest as of ``VllmEngine``.

    Raises:
        ConfigError: there is no such model.
    """
    if config.engine == "sim":
        from cluster.engines.sim import SimEngine

        return SimEngine(config)
    from cluster.engines.vllm import VllmEngine

    return VllmEngine(
        config,
        str(resolve(config.model)),
        {name: str(resolve(path)) for name, path in config.adapters.items()},
        ray_metrics=ray_metrics,
        traces_endpoint=traces_endpoint,
    )
