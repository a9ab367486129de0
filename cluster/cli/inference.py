"""``tandem chat`` and ``tandem classify``."""

import json
import sys
from collections.abc import Iterator, Mapping, Sequence

from rich.console import Console
from rich.table import Table

from cluster.cli.defaults import router_url
from cluster.cli.router_client import RouterClient, connect
from cluster.errors import NotFoundError, TandemError

CHAT_PATH = "/v1/chat/completions"
EXIT_COMMANDS = frozenset({"/exit", "/quit"})


def chat(
    model: str | None, url: str | None, key: str | None, max_tokens: int, temperature: float | None
) -> None:
    """Read questions and stream answers until the end of the input or ``/exit``.

    Raises:
        TandemError: a request failed, and the input is piped.
    """
    console = Console(highlight=False)
    sampling: dict[str, float] = {"max_tokens": max_tokens}
    if temperature is not None:
        sampling["temperature"] = temperature
    with connect(router_url(url), key) as router:
        conversation = Conversation(router, model or _first_model(router), sampling)
        interactive = sys.stdin.isatty()
        if interactive:
            console.print(f"{conversation.model}: Ctrl-C stops an answer, /exit or Ctrl-D quits")
        for question in _questions(interactive):
            try:
                conversation.ask(question)
            except KeyboardInterrupt:
                print(" …", flush=True)
            except TandemError as error:
                if not interactive:
                    raise
                console.print(f"error: {error}", style="red", markup=False)


def _questions(interactive: bool) -> Iterator[str]:
    if interactive:
        import readline  # noqa: F401  (enables history and line editing in input())
    while True:
        try:
            line = input("> " if interactive else "").strip()
        except EOFError:
            return
        except KeyboardInterrupt:  # nothing to stop at the prompt
            print()
            continue
        if line in EXIT_COMMANDS:
            return
        if line:
            yield line


def _first_model(router: RouterClient) -> str:
    models = router.get("/v1/models")["data"]  # generators come before classifiers
    if not models:
        raise NotFoundError("the router serves no models")
    return str(models[0]["id"])


class Conversation:
    """Chat with its history of messages."""

    def __init__(self, router: RouterClient, model: str, sampling: Mapping[str, float]) -> None:
        self.model = model
        self._router = router
        self._sampling = sampling
        self._messages: list[dict[str, str]] = []

    def ask(self, question: str) -> None:
        """Stream the answer to stdout.

        The history keeps partial answers, but no unanswered questions.
        """
        self._messages.append({"role": "user", "content": question})
        parts: list[str] = []
        try:
            for text in self._stream_answer():
                parts.append(text)
                print(text, end="", flush=True)
            print()
        finally:
            if parts:
                self._messages.append({"role": "assistant", "content": "".join(parts)})
            else:
                self._messages.pop()

    def _stream_answer(self) -> Iterator[str]:
        body = {"model": self.model, "messages": self._messages, "stream": True, **self._sampling}
        for event in self._router.events(CHAT_PATH, body):
            for choice in event.get("choices", []):
                if text := choice.get("delta", {}).get("content"):
                    yield text


def classify(
    texts: Sequence[str], model: str | None, url: str | None, key: str | None, *, as_json: bool
) -> None:
    body = {"input": list(texts), **({"model": model} if model else {})}
    with connect(router_url(url), key) as router:
        response = router.post("/classify", body)
    if as_json:
        print(json.dumps(response, indent=2))
        return
    table = Table.grid(padding=(0, 2))
    for text, row in zip(texts, response["data"], strict=True):
        table.add_row(row["label"], f"{row['score']:.3f}", text)
    Console().print(table, markup=False, highlight=False)
