"""Replica of the applications, without Ray."""

import json
from pathlib import Path
from typing import Any

import pytest

from cluster.config import parse
from cluster.link import LinkClient, RequestHead
from deployments.applications import Applications
from tests.serve.deployment_kit import SECRET, replace_ray


class RunningApplications(Applications):
    """Replica that is stopped by the test instead of the garbage collector."""

    stop = Applications.__del__

    def __del__(self) -> None:  # type: ignore[override]
        pass


async def test_a_replica_serves_the_tasks_over_its_link(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    replace_ray(monkeypatch, tmp_path)
    config = parse({"classifiers": [{"name": "c", "model": "m"}], "applications": {}})
    assert config.applications is not None
    replica: Any = RunningApplications.__new__(RunningApplications)
    await replica.__init__(config.with_default_models(config.applications), config.operations)
    metadata = replica.record_replica_metadata()
    assert "/v1/tasks/answer" in metadata["routes"]
    link = LinkClient(metadata["host"], metadata["port"], SECRET)
    await link.connect()
    try:
        head = RequestHead(method="POST", path="/v1/tasks/summarize", headers=[])
        answer = link.open(head, b'{"text": "Hello"}')
        assert (await answer.head()).status == 400
        error = json.loads(await answer.read())["error"]
        assert error["message"] == "No generator is configured; name one."
        await replica.check_health()
        pool = {**config.applications.model_dump(mode="json"), "max_chars": 3}
        operations = config.operations.model_dump(mode="json")
        await replica.reconfigure({"pool": pool, "operations": operations})
        answer = link.open(head, b'{"text": "Hello"}')
        assert (await answer.head()).status == 413
    finally:
        await link.close()
        await replica.stop()
