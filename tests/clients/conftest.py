"""A cluster with the default models, for the vendors' clients in ``.venv-clients``."""

import hashlib
import json
import os
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import pytest
from pydantic import BaseModel, Field

from tests.running import ROOT, RunningCluster, isolated_home

# No client may fetch price lists or send traces.
os.environ.update(LITELLM_LOCAL_MODEL_COST_MAP="True", LANGSMITH_TRACING="false")

if find_spec("litellm") is None:  # the main environment
    collect_ignore_glob = ["test_*.py"]

KEY, LIMITED_KEY, GUARDED_KEY = "sk-clients", "sk-limited", "sk-guarded"
QUESTION = "What is the capital of France?"
ANSWER = "The capital of France is Paris."
"""SmolLM2's answer at temperature 0; with its end, 8 tokens."""
MESSAGES = [{"role": "user", "content": QUESTION}]
VENV = ROOT / ".venv" / "bin"


class City(BaseModel):
    """A city."""

    # Bounded, because a small model may repeat itself until max_tokens.
    name: str = Field(max_length=20)
    big: bool


CITY_TOOL = {
    "type": "function",
    "function": {
        "name": "City",
        "description": "Save a city.",
        "parameters": {**City.model_json_schema(), "additionalProperties": False},
    },
}
CITY_CHOICE = {"type": "function", "function": {"name": "City"}}
"""The choice that makes the model call ``CITY_TOOL``."""


@dataclass(frozen=True)
class Server:
    """Address and keys of the cluster, whose models are in config.yaml."""

    url: str
    cluster: RunningCluster
    models: Path
    """Directory of the default models."""
    key: str = KEY
    limited_key: str = LIMITED_KEY
    """Key of a tenant that may have one request at a time."""
    guarded_key: str = GUARDED_KEY
    """Key whose requests to ``narrow`` are checked by the guard ``tone``."""

    @property
    def openai_url(self) -> str:
        return f"{self.url}/v1"


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Start the cluster of config.yaml with three API keys."""
    home = tmp_path_factory.mktemp("home")
    built = Path(os.environ.get("TANDEM_HOME") or "~/.cache/tandem").expanduser() / "models"
    (home / "models").symlink_to(built)
    (home / "keys.yaml").write_text(json.dumps(_key_file()), encoding="utf-8")
    config = home / "config.yaml"
    template = Path(__file__).with_name("config.yaml").read_text(encoding="utf-8")
    config.write_text(template.replace("RERANKER", str(_build_reranker(home))), encoding="utf-8")
    isolated = isolated_home(home)
    cluster = RunningCluster(
        home, isolated.env, isolated.http_url, isolated.ray_address, VENV / "tandem"
    )
    cluster.up("--config", str(config), *isolated.settings)
    yield Server(cluster.http_url, cluster, built)
    cluster.down()


def _key_file() -> dict[str, object]:
    digests = {
        key: hashlib.sha256(key.encode()).hexdigest() for key in (KEY, LIMITED_KEY, GUARDED_KEY)
    }
    return {
        "tenants": {"limited": {"max_concurrent": 1}},
        "keys": [
            {"sha256": digests[KEY], "tenant": "clients"},
            {"sha256": digests[LIMITED_KEY], "tenant": "limited"},
            {"sha256": digests[GUARDED_KEY], "tenant": "clients", "guards": ["tone"]},
        ],
    }


def _build_reranker(home: Path) -> Path:
    command = [VENV / "python", "-m", "tests.clients.reranker", home / "reranker"]
    subprocess.run(command, cwd=ROOT, check=True, timeout=300)
    return home / "reranker"
