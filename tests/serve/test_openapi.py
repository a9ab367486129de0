"""``GET /openapi.json`` of a router with classifiers and a simulated generator."""

import json
import re
from typing import Any

from cluster.config import GeneratorConfig
from cluster.engines.sim.engine import SimEngine
from cluster.gateway.admission.budgets import SPEND_PATH
from cluster.gateway.builtin.own_paths import BATCH_PATHS, OWN_PATHS
from cluster.gateway.reporting.usage_report import COPIES_PATH, ROWS_PATH
from tests import asgi
from tests.serve.gateway_kit import gateway_world

ERRORS = {"400", "401", "403", "404", "405", "413", "429", "431", "500", "503"}


async def document_of(*replicas: Any) -> Any:
    """Return the document of a router with replicas (pool and application)."""
    async with gateway_world() as world:
        for number, (pool, app) in enumerate(replicas):
            await world.serve(app, pool, f"{pool}-{number}", ("/x",))
        document = (await asgi.get(world.app, "/openapi.json")).json()
        # The engines' documents are cached.
        assert (await asgi.get(world.app, "/openapi.json")).json() == document
        return document


class Engine:
    """Application that answers with a document."""

    def __init__(self, path: str, schema: Any, media_type: str = "application/json") -> None:
        content = {media_type: {"schema": schema}}
        operation = {
            "requestBody": {"content": content},
            "responses": {"200": {"content": content}},
        }
        self._document = {"paths": {path: {"post": operation}}}

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        body = json.dumps(self._document).encode()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": body})


async def test_every_operation_has_an_id_a_summary_and_tags_and_every_reference_a_target() -> None:
    engine = SimEngine(GeneratorConfig(name="gen", model="sim", engine="sim"))
    await engine.start()
    document = await document_of(("gen", engine.app))
    await engine.stop()
    operations = [operation for item in document["paths"].values() for operation in item.values()]
    assert len({operation["operationId"] for operation in operations}) == len(operations)
    tags = {tag["name"] for tag in document["tags"]}
    for operation in operations:
        assert operation["summary"]
        assert set(operation["tags"]) <= tags
        assert "x-request-id" in operation["responses"]["200"]["headers"]
    for section, name in re.findall(r'"#/components/(\w+)/([^"]+)"', json.dumps(document)):
        assert name in document["components"][section]


async def test_all_paths_of_the_router_are_described() -> None:
    async with gateway_world() as world:
        paths = (await asgi.get(world.app, "/openapi.json")).json()["paths"]
        for path in paths:
            for method in paths[path]:
                answer = await asgi.call(world.app, method.upper(), path.replace("{model}", "gen"))
                assert str(answer.status) in paths[path][method]["responses"], path
                assert answer.status != 404, path
    # Usage needs a file for the sums, batches a database (test_batches.py).
    usage = {"/v1/usage", ROWS_PATH, COPIES_PATH, SPEND_PATH}
    assert paths.keys() == OWN_PATHS.keys() - usage - BATCH_PATHS.keys()


async def test_errors_are_declared_in_the_format_of_the_api() -> None:
    document = await document_of(
        ("gen", Engine("/v1/messages", {})), ("cls", Engine("/classify", {}))
    )
    responses = document["components"]["responses"]
    for path, body in (("/v1/messages", "AnthropicErrorBody"), ("/classify", "ErrorBody")):
        declared = document["paths"][path]["post"]["responses"]
        assert declared.keys() - {"200"} >= ERRORS
        for status in ERRORS:
            response = responses[declared[status]["$ref"].rsplit("/")[-1]]
            schema = response["content"]["application/json"]["schema"]
            assert schema == {"$ref": f"#/components/schemas/{body}"}
            assert ("retry-after" in response["headers"]) == (status in ("429", "503"))
    assert "401" not in document["paths"]["/health"]["get"]["responses"]


async def test_a_path_of_two_engines_accepts_and_answers_what_both_do() -> None:
    text, number = {"type": "string"}, {"type": "number"}
    document = await document_of(
        ("gen", Engine("/tokenize", text)), ("cls", Engine("/tokenize", number))
    )
    operation = document["paths"]["/tokenize"]["post"]
    either = {"application/json": {"schema": {"anyOf": [text, number]}}}
    assert operation["requestBody"]["content"] == either
    assert operation["responses"]["200"]["content"] == either


async def test_a_stream_of_any_engine_may_end_with_the_usage() -> None:
    stream, first, second = "text/event-stream", {"type": "object"}, {"type": "array"}
    document = await document_of(
        ("gen", Engine("/v1/messages", first, stream)),
        ("cls", Engine("/v1/messages", second, stream)),
    )
    answer = document["paths"]["/v1/messages"]["post"]["responses"]["200"]
    options = answer["content"][stream]["schema"]["anyOf"]
    assert [one for one in options if "properties" not in one] == [first, second]
    (usage,) = (one for one in options if "properties" in one)
    assert usage["properties"]["event"] == {"const": "tandem.usage"}
