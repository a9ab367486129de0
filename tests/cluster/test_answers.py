"""Errors and usage of real streams, with vLLM and the vendors' clients."""

from typing import Any

import openai
import pytest

from tests.cluster.conftest import RunningCluster

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
