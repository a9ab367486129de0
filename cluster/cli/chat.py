"""``tandem chat``: a chat on the terminal, or over lines that are piped in."""

import sys
from collections.abc import Iterator
from dataclasses import dataclass

from rich.console import Console

from cluster.cli.http import Connection, connect
from cluster.cli.paths import router_url
from cluster.errors import NotFoundError, TandemError

PATH = "/v1/chat/completions"
EXITS = frozenset({"/exit", "/quit"})


@dataclass(frozen=True, slots=True)
class Options:
    """What the command line asks for."""

    model: str | None
    url: str | None
    api_key: str | None
    max_tokens: int
    temperature: float | None


def run(options: Options) -> None:
    """Read questions and stream answers until the input ends or ``/exit``.

    Raises:
        TandemError: piped input, and a question could not be answered.
    """
    console = Console(highlight=False)
    with connect(router_url(options.url), options.api_key) as http:
        chat = Chat(http, options, options.model or _first_generator(http))
        interactive = sys.stdin.isatty()
        if interactive:
            console.print(f"{chat.model}; /exit or Ctrl-D leaves, Ctrl-C stops an answer")
        for question in _questions(interactive):
            try:
                chat.ask(question)
            except KeyboardInterrupt:
                print(" …", flush=True)
            except TandemError as error:
                if not interactive:
                    raise
                console.print(f"error: {error}", style="red", markup=False)


def _questions(interactive: bool) -> Iterator[str]:
    if interactive:
        import readline  # noqa: F401  (gives input() its history and line editing)
    while True:
        try:
            line = input("> " if interactive else "").strip()
        except EOFError:
            return
        except KeyboardInterrupt:  # an empty prompt has nothing to stop
            print()
            continue
        if line in EXITS:
            return
        if line:
            yield line


def _first_generator(http: Connection) -> str:
    """The first model that chats: the router lists generators before classifiers."""
    models = http.get("/v1/models")["data"]
    if not models:
        raise NotFoundError("the router serves no models")
    return str(models[0]["id"])


class Chat:
    """One conversation: what was said so far."""

    def __init__(self, http: Connection, options: Options, model: str) -> None:
        self.model = model
        self._http = http
        self._options = options
        self._messages: list[dict[str, str]] = []

    def ask(self, question: str) -> None:
        """Print the answer as it comes.

        A question without an answer is forgotten; a part of an answer is kept.
        """
        self._messages.append({"role": "user", "content": question})
        parts: list[str] = []
        try:
            for text in self._answer():
                parts.append(text)
                print(text, end="", flush=True)
            print()
        finally:
            if parts:
                self._messages.append({"role": "assistant", "content": "".join(parts)})
            else:
                self._messages.pop()

    def _answer(self) -> Iterator[str]:
        body = {
            "model": self.model,
            "messages": self._messages,
            "max_tokens": self._options.max_tokens,
            "stream": True,
        }
        if self._options.temperature is not None:
            body["temperature"] = self._options.temperature
        for event in self._http.events(PATH, body):
            for choice in event.get("choices", []):
                if text := choice.get("delta", {}).get("content"):
                    yield text
