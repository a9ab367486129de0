"""Where the command line finds things: the configuration, and the running router."""

from collections.abc import Sequence
from pathlib import Path

from cluster.config.file import LoadedConfig, load
from cluster.errors import ConfigError
from cluster.launch import state
from cluster.models.store import home

NAME = "ray-config.yaml"
DEFAULT_URL = "http://127.0.0.1:8000"


def load_config(path: Path | None, overrides: Sequence[str]) -> LoadedConfig:
    """Load ``path``, else ``ray-config.yaml`` of this directory or of Tandem's own checkout.

    Raises:
        ConfigError: there is none, or a value in it is wrong.
    """
    return load(path or _default(), overrides)


def _default() -> Path:
    checkout = Path(__file__).parents[2]
    for directory in (Path.cwd(), checkout):
        if (directory / NAME).is_file():
            return directory / NAME
    raise ConfigError(f"no {NAME} in {Path.cwd()}; name a file with --config")


def router_url(url: str | None) -> str:
    """``url``, else where the running cluster's router listens."""
    if url is not None:
        return url.rstrip("/")
    running = state.load(home())
    return running.http_url if running else DEFAULT_URL
