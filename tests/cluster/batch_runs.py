"""A batch of completions that is followed through the HTTP of any node."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import httpx

from tests.running import wait_until

PATH = "/v1/completions"
TIMEOUT_S = 240.0
"""Maximum duration of a step, in seconds; the longest one starts a replica of vLLM."""


@dataclass(frozen=True)
class RunningBatch:
    """A submitted batch; errors of HTTP while processes are replaced count as no progress."""

    client: httpx.Client
    id: str
    num_lines: int

    def wait_for_lines(self, url: str, num: int = 1) -> None:
        """Wait until ``num`` lines have an answer."""
        self._wait(lambda: self._read(url)["request_counts"]["completed"] >= num, f"line {num}")

    def check_results(self, url: str, max_tokens: int) -> None:
        """Wait for the end, and assert that each line has exactly one complete answer."""
        content = ""

        def has_ended() -> bool:
            nonlocal content
            if (batch := self._read(url))["status"] != "completed":
                return False
            content = self._get(f"{url}/v1/files/{batch['output_file_id']}/content").text
            return True

        self._wait(has_ended, "the end of the batch")
        answers = [json.loads(line) for line in content.splitlines()]
        assert [answer["custom_id"] for answer in answers] == [*map(str, range(self.num_lines))]
        tokens = {a["response"]["body"]["usage"]["completion_tokens"] for a in answers}
        assert tokens == {max_tokens}

    def _read(self, url: str) -> Any:
        return self._get(f"{url}/v1/batches/{self.id}").json()

    def _get(self, url: str) -> httpx.Response:
        return self.client.get(url).raise_for_status()

    @staticmethod
    def _wait(condition: Callable[[], bool], event: str) -> None:
        wait_until(condition, TIMEOUT_S, event, ignored=(httpx.HTTPError,))


def submit(client: httpx.Client, url: str, models: Sequence[str], max_tokens: int) -> RunningBatch:
    """Submit a batch with a line for each of ``models``."""
    body = {"prompt": "Count: 1", "max_tokens": max_tokens, "ignore_eos": True}
    lines = [
        {"custom_id": str(i), "method": "POST", "url": PATH, "body": {**body, "model": model}}
        for i, model in enumerate(models)
    ]
    content = "\n".join(map(json.dumps, lines))
    sent = {"files": {"file": ("in.jsonl", content)}, "data": {"purpose": "batch"}}
    file = client.post(f"{url}/v1/files", **sent).raise_for_status().json()  # type: ignore[arg-type]
    fields = {"input_file_id": file["id"], "endpoint": PATH, "completion_window": "24h"}
    batch = client.post(f"{url}/v1/batches", json=fields).raise_for_status().json()
    return RunningBatch(client, batch["id"], len(lines))
