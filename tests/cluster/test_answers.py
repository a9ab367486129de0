"""Errors and usage of real streams, with vLLM and the vendors' clients."""

import contextlib
import re
import time
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
        text = httpx.get(f"{cluster.http_url}/metrics", timeout=30).text
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
    deadline = time.monotonic() + 2
    with (
        contextlib.suppress(httpx.ReadTimeout),  # of the response that is not streamed
        httpx.stream("POST", f"{cluster.http_url}/v1/completions", json=body, timeout=2) as answer,
    ):
        for _ in answer.iter_raw():
            if time.monotonic() > deadline:
                break
    wait_until(lambda: counted() > before, 60, "counting the tokens")
