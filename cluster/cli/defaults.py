"""Default configuration file, the running cluster, and default URL of the router."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from cluster.config.file import LoadedConfig, load
from cluster.errors import ConfigError, StartError
from cluster.launch import state
from cluster.launch.serve_api import ServeApi
from cluster.models.store import home

CONFIG_NAME = "ray-config.yaml"
DEFAULT_URL = "http://127.0.0.1:8000"


def load_config(
    path: Path | None, overrides: Sequence[str], *, address: str | None = None
) -> LoadedConfig:
    """Load ``path``, or by default ``ray-config.yaml`` of this directory or Tandem's checkout.

    Raises:
        ConfigError: the file does not exist, or a value in it is invalid.
    """
    defaults = [directory / CONFIG_NAME for directory in (Path.cwd(), Path(__file__).parents[2])]
    found = path or next((default for default in defaults if default.is_file()), None)
    if found is None:
        raise ConfigError(f"no {CONFIG_NAME} in {Path.cwd()}; pass a file with --config")
    return load(found, overrides, address=address)


@contextmanager
def running_application() -> Iterator[tuple[ServeApi, str]]:
    """Yield access to the running cluster's Serve, and the name of the application.

    Raises:
        StartError: no cluster runs.
    """
    running = state.load(home())
    if running is None:
        raise StartError("No cluster is running; start one with `tandem up`.")
    with ServeApi(running.dashboard_url, running.token(home())) as api:
        yield api, running.application


def router_url(url: str | None) -> str:
    """Return ``url``, or by default the URL of the running cluster's router."""
    if url is not None:
        return url.rstrip("/")
    running = state.load(home())
    return running.http_url if running else DEFAULT_URL
