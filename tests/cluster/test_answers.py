"""Errors and usage of real streams, with vLLM and the vendors' clients."""

import contextlib
import re
from typing import Any

import httpx
import openai
import pytest

from tests.cluster.conftest import RunningCluster, wait_until

MODEL = "smollm2"


def test_error_in_the_first_event_of_a_stream_is_the_status(cluster: RunningCluster) -> None:
    def stream(top_logprobs: int) -> Any:
        return client.chat.completions.create(
            model=MODEL,
            messages=[{"role": "user", "content": "Hi"}],
            max_tokens=4,
            logprobs=True,
            top_logprobs=top_logprobs,
            stream=True,
        )

    with openai.OpenAI(base_url=f"{cluster.http_url}/v1", api_key="none", max_retries=0) as client:
        assert len(list(stream(2))) >= 4
        with pytest.raises(openai.BadRequestError, match="logprobs"):
            stream(99)


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
def test_disconnected_client_pays_for_its_tokens(cluster: RunningCluster, stream: bool) -> None:
    def counted() -> float:
        text = httpx.get(f"{cluster.http_url}/metrics", timeout=60).text
        pattern = rf'^tandem_completion_tokens_total{{[^}}]*"{MODEL}"[^}}]*}} (\S+)$'
        return sum(float(value) for value in re.findall(pattern, text, re.MULTILINE))

    body = {
        "model": MODEL,
        "prompt": "Once upon a time",
        "max_tokens": 1500,
        "ignore_eos": True,
        "stream": stream,
    }
    before = counted()

    def leave() -> None:
        """Leave after some parts of the answer, or after two seconds if it is not streamed."""
        timeout_s = 60 if stream else 2
        with (
            contextlib.suppress(httpx.ReadTimeout),
            httpx.stream(
                "POST", f"{cluster.http_url}/v1/completions", json=body, timeout=timeout_s
            ) as answer,
        ):
            for number, _ in enumerate(answer.iter_raw()):
                if number == 3:
                    break

    def is_counted() -> bool:
        leave()  # again if a slow machine had no token after two seconds
        with contextlib.suppress(AssertionError):
            wait_until(lambda: counted() > before, 10, "counting the tokens")
        return counted() > before

    wait_until(is_counted, 120, "counting the tokens")
