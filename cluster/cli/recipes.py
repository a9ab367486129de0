"""Output of ``tandem up`` after the start: addresses, and example commands for each API."""

import json
from pathlib import Path
from typing import Any

from rich.console import Console

from cluster.config import TandemConfig
from cluster.launch.auth import token_file
from cluster.launch.state import ClusterState

QUESTION = "What is the capital of France?"
REVIEWS = ["A warm, funny and wonderful film.", "Two hours of my life that I will never get back."]


def print_recipes(console: Console, config: TandemConfig, state: ClusterState) -> None:
    console.print(f"\nHTTP       {state.http_url}", highlight=False)
    console.print(f"dashboard  {state.dashboard_url}", highlight=False)
    console.print(f"Ray jobs   export RAY_ADDRESS={state.ray_address}\n", highlight=False)
    for title, command in recipes(config, state.http_url):
        console.print(f"# {title}", style="dim", highlight=False)
        console.print(command, markup=False, highlight=False, soft_wrap=True)


def print_join(console: Console, ray_address: str, home: Path) -> None:
    """Print how other nodes join, and what Ray jobs need."""
    token = token_file(home)
    lines = [
        f"# On each further node, once Ray runs here, with a copy of {token}:",
        f"tandem join {ray_address} --token-file {token.name}",
        "# In the shell of other Ray jobs:",
        f"export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH={token}",
    ]
    for line in lines:
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def recipes(config: TandemConfig, url: str) -> list[tuple[str, str]]:
    """Return (title, command) pairs for every API that the configuration serves."""
    key = config.router.requires_keys
    found = [("list models", _curl(url, "/v1/models", key=key))]
    if config.generators:
        name = config.generators[0].name
        found += [(title, _curl(url, *call, key=key)) for title, *call in _generator_calls(name)]
    classify = [c.name for c in config.classifiers if "classify" in c.tasks]
    embed = [c.name for c in config.classifiers if "embed" in c.tasks]
    if classify:
        body = {"model": classify[0], "input": REVIEWS}
        found.append(("classify", _curl(url, "/classify", body, key=key)))
    if embed:
        body = {"model": embed[0], "input": "a sentence"}
        found.append(("embeddings", _curl(url, "/v1/embeddings", body, key=key)))
    return [*found, ("from Python, in any Ray job", _python(config))]


def _generator_calls(model: str) -> list[tuple[Any, ...]]:
    question = [{"role": "user", "content": QUESTION}]
    chat = {"model": model, "temperature": 0, "messages": question}
    text = {"model": model, "prompt": "Paris is", "max_tokens": 16}
    message = {"model": model, "max_tokens": 64, "messages": question}
    return [
        ("chat", "/v1/chat/completions", chat),
        ("streaming chat", "/v1/chat/completions", {**chat, "stream": True}),
        ("completions", "/v1/completions", text),
        ("OpenAI responses API", "/v1/responses", {"model": model, "input": QUESTION}),
        ("Anthropic messages API", "/v1/messages", message),
        ("tokenize", "/tokenize", {"model": model, "prompt": QUESTION}),
    ]


def _curl(url: str, path: str, body: dict[str, Any] | None = None, *, key: bool = False) -> str:
    stream = "-N " if body and body.get("stream") else ""
    header = '-H "Authorization: Bearer $TANDEM_API_KEY" ' if key else ""
    if body is None:
        return f"curl -s {header}{url}{path}"
    text = json.dumps(body, ensure_ascii=False).replace("'", "'\\''")
    return f"curl -s {stream}{header}{url}{path} -H 'Content-Type: application/json' -d '{text}'"


def _python(config: TandemConfig) -> str:
    lines = ["from cluster.client import Tandem", "tandem = Tandem()"]
    if config.generators:
        lines.append(f'print(tandem.chat("{QUESTION}"))')
    if any("classify" in c.tasks for c in config.classifiers):
        lines.append(f'print(tandem.classify("{REVIEWS[0]}"))')
    return "\n".join(lines)
