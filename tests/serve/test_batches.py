"""Files and batches over HTTP, with a gateway and small applications as replicas."""

import asyncio
import hashlib
import json
import math
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from cluster.asgi import Receive, Scope, Send
from cluster.batches import BatchStore, open_store
from cluster.errors import LinkClosedError
from cluster.gateway.batches.routes import MAX_UPLOADS
from cluster.gateway.batches.service import MAX_RUNS
from cluster.gateway.batches.uploads import receive_form
from cluster.gateway.builtin.own_paths import BATCH_PATHS
from cluster.key_file import KeyFile
from tests import asgi
from tests.serve.batch_place import Place
from tests.serve.gateway_kit import CHAT, World, gateway_world, metrics, read_body

BOUNDARY = "5f0"


@pytest.fixture
def store(tmp_path: Path) -> BatchStore:
    return open_store(tmp_path)


def line(number: int, **body: Any) -> dict[str, Any]:
    fields = {"model": "gen", **body}
    return {"custom_id": f"c{number}", "method": "POST", "url": CHAT, "body": fields}


def form(content: bytes, purpose: str = "batch", name: str = "file") -> bytes:
    return (
        (
            f"--{BOUNDARY}\r\nContent-Disposition: form-data; name=purpose\r\n\r\n{purpose}\r\n"
            f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="{name}"; filename="in"\r\n\r\n'
        ).encode()
        + content
        + f"\r\n--{BOUNDARY}--\r\n".encode()
    )


HEADERS = {"content-type": f"multipart/form-data; boundary={BOUNDARY}"}


async def upload(world: World, lines: list[Any], key: str = "") -> str:
    content = b"\n".join(json.dumps(each).encode() for each in lines)
    headers = {**HEADERS, **auth(key)}
    answer = await asgi.call(world.app, "POST", "/v1/files", form(content), headers)
    assert answer.status == 200, answer.body
    file = answer.json()
    assert file["bytes"] == len(content)
    return str(file["id"])


def auth(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"} if key else {}


async def create(world: World, file: str, key: str = "", **fields: Any) -> Any:
    body = {"input_file_id": file, "endpoint": CHAT, "completion_window": "24h", **fields}
    return await asgi.post(world.app, "/v1/batches", body, headers=auth(key))


async def batch_of(world: World, id_: str, key: str = "") -> Any:
    return (await asgi.get(world.app, f"/v1/batches/{id_}", headers=auth(key))).json()


async def until(world: World, id_: str, status: str, key: str = "") -> Any:
    async with asyncio.timeout(60):
        while True:
            batch = await batch_of(world, id_, key)
            if batch["status"] == status:
                return batch
            await asyncio.sleep(0.02)


async def until_done(world: World, id_: str, number: int) -> None:
    async with asyncio.timeout(60):
        while (await batch_of(world, id_))["request_counts"]["completed"] < number:  # noqa: ASYNC110
            await asyncio.sleep(0.02)


async def results(world: World, file: str | None, key: str = "") -> list[Any]:
    if file is None:
        return []
    answer = await asgi.get(world.app, f"/v1/files/{file}/content", headers=auth(key))
    assert answer.status == 200
    assert int(answer.headers["content-length"]) == len(answer.body)
    return [json.loads(each) for each in answer.body.splitlines()]


async def test_a_batch_runs_at_the_lowest_priority(store: BatchStore) -> None:
    async with gateway_world(batch_store=store) as world:
        replica = await world.add("gen", "gen-1")
        file = await upload(world, [line(number, prompt_tokens=3) for number in range(20)])
        created = (await create(world, file, metadata={"a": "b"})).json()
        assert created["status"] == "validating"
        batch = await until(world, created["id"], "completed")
        assert batch["request_counts"] == {"total": 20, "completed": 20, "failed": 0}
        assert batch["metadata"] == {"a": "b"}
        assert batch["usage"]["input_tokens"] == 60
        assert batch["error_file_id"] is None
        found = await results(world, batch["output_file_id"])
        assert sorted(each["custom_id"] for each in found) == sorted(f"c{n}" for n in range(20))
        assert found[0]["response"]["status_code"] == 200
        assert found[0]["response"]["body"]["path"] == CHAT
        assert len(replica.bodies) == 20
        assert all(json.loads(body)["priority"] == 8 for body in replica.bodies)
        listed = (await asgi.get(world.app, "/v1/batches?limit=1")).json()
        assert [each["id"] for each in listed["data"]] == [batch["id"]]
        files = (await asgi.get(world.app, "/v1/files?purpose=batch")).json()["data"]
        assert [each["id"] for each in files] == [file]
        counted = await metrics(world)
        assert counted["tandem_batch_lines_total", "completed"] == 20


async def test_bad_lines_fail_the_batch_before_it_runs(store: BatchStore) -> None:
    async with gateway_world(batch_store=store) as world:
        file = await upload(world, [line(1), line(1), {**line(2), "method": "GET"}])
        batch = await until(world, (await create(world, file)).json()["id"], "failed")
        assert [(each["code"], each["line"]) for each in batch["errors"]["data"]] == [
            ("duplicate_custom_id", 2),
            ("invalid_method", 3),
        ]


async def test_failed_lines_are_in_the_error_file(
    store: BatchStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cluster.gateway.batches.answers.MAX_ATTEMPTS", 1)
    async with gateway_world(batch_store=store) as world:
        await world.add("gen", "gen-1")
        file = await upload(world, [line(1), line(2, fail=True), line(3, n=10**6, prompt="a")])
        batch = await until(world, (await create(world, file)).json()["id"], "completed")
        assert batch["request_counts"]["completed"] + batch["request_counts"]["failed"] == 3
        failed = await results(world, batch["error_file_id"])
        assert "c2" in {each["custom_id"] for each in failed}
        good = await results(world, batch["output_file_id"])
        assert "c1" in {each["custom_id"] for each in good}
        assert len(good) + len(failed) == 3


async def test_a_line_that_ends_its_replicas_fails_alone(
    store: BatchStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cluster.gateway.batches.answers.MAX_LOST_ATTEMPTS", 2)
    monkeypatch.setattr("cluster.gateway.batches.runner.MAX_PAUSE_S", 0.05)
    num_lost = 0

    async with gateway_world(batch_store=store) as world:

        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            nonlocal num_lost
            body = await read_body(receive)
            if b"poison" in body:
                num_lost += 1
                for connection in tuple(world.servers["gen-1"].connections):
                    connection.fail(LinkClosedError("died"))
                return
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await send({"type": "http.response.body", "body": b"{}"})

        await world.serve(app, "gen", "gen-1")
        lines = [line(1), line(2, prompt="poison"), line(3)]
        file = await upload(world, lines)
        batch = await until(world, (await create(world, file)).json()["id"], "completed")
        assert batch["request_counts"]["failed"] >= 1
        failed = await results(world, batch["error_file_id"])
        (poison,) = [each for each in failed if each["custom_id"] == "c2"]
        assert poison["response"]["status_code"] == 503
        assert num_lost >= 2


async def test_lines_are_not_passed_to_fallback_models(
    store: BatchStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cluster.gateway.batches.answers.MAX_ATTEMPTS", 1)
    more = [{"name": "large", "model": "m"}]
    generator = {"fallbacks": ["large"]}
    async with gateway_world(batch_store=store, generator=generator, more_generators=more) as world:
        await world.add("gen", "gen-1")
        large = await world.add("large", "large-1")
        file = await upload(world, [line(1, fail=True)])
        id_ = (await create(world, file)).json()["id"]
        batch = await until(world, id_, "completed")
        assert batch["request_counts"]["failed"] == 1
        assert large.bodies == []


async def test_uploads_of_a_tenant_at_once_are_limited(
    store: BatchStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate, num_waiting = asyncio.Event(), 0

    async def receive(*arguments: Any) -> Any:
        nonlocal num_waiting
        num_waiting += 1
        await gate.wait()
        return await receive_form(*arguments)

    monkeypatch.setattr("cluster.gateway.batches.routes.receive_form", receive)
    async with gateway_world(batch_store=store) as world:

        async def send() -> int:
            return (await asgi.call(world.app, "POST", "/v1/files", form(b"x"), HEADERS)).status

        uploads = [asyncio.create_task(send()) for _ in range(MAX_UPLOADS)]
        await world.until(lambda: num_waiting == MAX_UPLOADS)
        assert await send() == 429
        gate.set()
        assert await asyncio.gather(*uploads) == [200] * MAX_UPLOADS
        assert await send() == 200


async def test_a_full_disk_leaves_no_part_of_an_upload(
    store: BatchStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    def create_full(path: Path) -> Any:
        path.parent.mkdir(parents=True)
        path.touch()
        return Path("/dev/full").open("wb")

    monkeypatch.setattr("cluster.gateway.batches.uploads._create", create_full)
    async with gateway_world(batch_store=store) as world:
        answer = await asgi.call(world.app, "POST", "/v1/files", form(b"x" * 300_000), HEADERS)
        assert answer.status == 500
    assert not list(store.part("").parent.glob("*"))


async def test_a_lost_router_is_followed_by_another_with_one_result_per_line(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cluster.gateway.batches.service.LEASE_S", 0.5)
    lines = [line(number, wait_before=number >= 5) for number in range(10)]
    async with gateway_world(batch_store=place.open()) as lost:
        await lost.add("gen", "gen-1")
        id_ = (await create(lost, await upload(lost, lines))).json()["id"]
        await until_done(lost, id_, 5)
        # As after kill -9: the lease stays, and nothing is written any more.
        monkeypatch.setattr("cluster.batches.BatchStore.drop_lease", lambda *_: None)
    async with gateway_world(batch_store=place.open()) as world:
        replica = await world.add("gen", "gen-1")
        replica.gate.set()
        batch = await until(world, id_, "completed")
        assert batch["request_counts"] == {"total": 10, "completed": 10, "failed": 0}
        found = await results(world, batch["output_file_id"])
        assert sorted(each["custom_id"] for each in found) == [f"c{n}" for n in range(10)]
        assert len(replica.bodies) == 5  # only those without a result


async def test_one_router_runs_a_batch_that_all_routers_show(place: Place) -> None:
    async with (
        gateway_world(batch_store=place.open()) as one,
        gateway_world(batch_store=place.open()) as two,
    ):
        replicas = [await world.add("gen", "gen-1") for world in (one, two)]
        id_ = (await create(one, await upload(one, [line(n) for n in range(10)]))).json()["id"]
        for world in (two, one):
            batch = await until(world, id_, "completed")
            found = await results(world, batch["output_file_id"])
            assert [each["custom_id"] for each in found] == [f"c{n}" for n in range(10)]
        assert sorted(len(replica.bodies) for replica in replicas) == [0, 10]


async def test_without_its_database_batches_answer_503(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cluster.batches.postgres.LOG_S", math.inf)
    store = open_store(tmp_path, "postgresql://nobody@/none?host=/nonexistent")
    async with gateway_world(batch_store=store) as world:
        for answer in (
            await asgi.call(world.app, "POST", "/v1/files", form(b"x"), HEADERS),
            await asgi.get(world.app, "/v1/batches"),
            await asgi.get(world.app, "/v1/files/file-1/content"),
        ):
            assert answer.status == 503
            message = answer.json()["error"]["message"]
            assert message == "The database of batches is unavailable; try again."
            assert int(answer.headers["retry-after"]) > 0
    failures = [each for each in caplog.messages if each.startswith("batches: the database failed")]
    assert len(failures) == 1
    assert "/nonexistent" in failures[0]
    assert not list(store.part("").parent.glob("*"))


async def test_a_file_that_was_deleted_meanwhile_is_not_found(
    store: BatchStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with gateway_world(batch_store=store) as world:
        file = await upload(world, [line(1)])
        find = BatchStore.find_file

        def find_and_delete(store: BatchStore, id_: str, tenant: str) -> Any:
            found = find(store, id_, tenant)
            store.delete_file(id_, tenant)
            return found

        monkeypatch.setattr(BatchStore, "find_file", find_and_delete)
        assert (await asgi.get(world.app, f"/v1/files/{file}/content")).status == 404
        again = await upload(world, [line(1)])
        assert (await create(world, again)).status == 404
        assert (await asgi.call(world.app, "DELETE", f"/v1/files/{again}")).status == 404


async def test_lines_yield_to_other_requests_and_run_again(store: BatchStore) -> None:
    async with gateway_world(batch_store=store, generator={"max_in_flight": 8}) as world:
        replica = await world.add("gen", "gen-1")
        file = await upload(world, [line(number, wait_before=True) for number in range(3)])
        id_ = (await create(world, file)).json()["id"]
        await world.until(lambda: len(replica.bodies) == 1)
        other = asgi.start(world.app, "POST", CHAT, {"model": "gen", "wait_before": True})
        await world.until(lambda: replica.cancelled == 1)
        replica.gate.set()
        assert (await other.done()).status == 200
        batch = await until(world, id_, "completed")
        assert batch["request_counts"]["completed"] == 3
        assert len(replica.bodies) == 5
        assert (await metrics(world))["tandem_batch_preemptions_total", "gen"] == 1


async def test_lines_run_side_by_side_once_those_before_have_slots(
    store: BatchStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cluster.gateway.batches.spare.PLACEMENT_S", math.inf)
    async with gateway_world(batch_store=store, generator={"max_in_flight": 8}) as world:
        replica = await world.add("gen", "gen-1")
        lines = [line(0), line(1, wait_before=True), line(2, wait_before=True)]
        id_ = (await create(world, await upload(world, lines))).json()["id"]
        await world.until(lambda: len(replica.bodies) == 3)
        replica.gate.set()
        await until(world, id_, "completed")


async def test_a_cancelled_batch_keeps_its_results(store: BatchStore) -> None:
    async with gateway_world(batch_store=store) as world:
        replica = await world.add("gen", "gen-1")
        lines = [line(number, wait_before=number >= 2) for number in range(5)]
        file = await upload(world, lines)
        id_ = (await create(world, file)).json()["id"]
        await until_done(world, id_, 2)
        assert (await asgi.call(world.app, "DELETE", f"/v1/files/{file}")).status == 400
        cancelled = await asgi.post(world.app, f"/v1/batches/{id_}/cancel", None)
        assert cancelled.json()["status"] == "cancelling"
        batch = await until(world, id_, "cancelled")
        assert len(await results(world, batch["output_file_id"])) == 2
        errors = await results(world, batch["error_file_id"])
        assert [each["error"]["code"] for each in errors] == ["batch_cancelled"] * 3
        assert (await asgi.post(world.app, f"/v1/batches/{id_}/cancel", None)).status == 400
        assert (await asgi.call(world.app, "DELETE", f"/v1/files/{file}")).json()["deleted"]
        await world.until(lambda: replica.cancelled > 0)


async def test_lines_leave_the_concurrency_of_their_tenant_to_its_requests(
    store: BatchStore, tmp_path: Path
) -> None:
    digest = hashlib.sha256(b"key").hexdigest()
    keys = tmp_path / "keys.json"
    tenants = {"acme": {"max_concurrent": 1}}
    keys.write_text(
        json.dumps({"tenants": tenants, "keys": [{"sha256": digest, "tenant": "acme"}]})
    )
    async with gateway_world(KeyFile(keys, expected=True), batch_store=store) as world:
        replica = await world.add("gen", "gen-1")
        file = await upload(world, [line(1, wait_before=True)], "key")
        id_ = (await create(world, file, "key")).json()["id"]
        await world.until(lambda: len(replica.bodies) == 1)
        answer = await asgi.post(world.app, CHAT, {"model": "gen"}, headers=auth("key"))
        assert answer.status == 200
        replica.gate.set()
        await until(world, id_, "completed", "key")


async def test_a_tenants_batches_wait_for_each_other_but_end_at_once(store: BatchStore) -> None:
    async with gateway_world(batch_store=store) as world:
        replica = await world.add("gen", "gen-1")
        file = await upload(world, [line(1, wait_before=True)])
        ids = [(await create(world, file)).json()["id"] for _ in range(MAX_RUNS + 2)]
        await until(world, ids[MAX_RUNS - 1], "in_progress")
        await asgi.post(world.app, f"/v1/batches/{ids[-1]}/cancel", None)
        await until(world, ids[-1], "cancelled")
        assert (await batch_of(world, ids[MAX_RUNS]))["status"] == "validating"
        replica.gate.set()
        for id_ in ids[:-1]:
            await until(world, id_, "completed")


async def test_lines_that_are_late_expire(store: BatchStore) -> None:
    now = [1000.0]
    async with gateway_world(batch_store=store, batch_clock=lambda: now[0]) as world:
        await world.add("gen", "gen-1")
        file = await upload(world, [line(1), line(2, wait_before=True)])
        id_ = (await create(world, file, completion_window="1h")).json()["id"]
        await until_done(world, id_, 1)
        now[0] += 3601
        batch = await until(world, id_, "expired")
        assert batch["request_counts"] == {"total": 2, "completed": 1, "failed": 1}
        (error,) = await results(world, batch["error_file_id"])
        assert error["error"]["code"] == "batch_expired"


async def test_tenants_see_their_own_and_are_charged(store: BatchStore) -> None:
    digests = [hashlib.sha256(key.encode()).hexdigest() for key in ("one", "two")]
    async with gateway_world(batch_store=store, api_keys_sha256=digests) as world:
        await world.add("gen", "gen-1")
        file = await upload(world, [line(1, prompt_tokens=7)], "one")
        assert (await create(world, file, "two")).status == 404
        id_ = (await create(world, file, "one")).json()["id"]
        batch = await until(world, id_, "completed", key="one")
        for path in (f"batches/{id_}", f"files/{file}", f"files/{batch['output_file_id']}/content"):
            assert (await asgi.get(world.app, f"/v1/{path}", headers=auth("two"))).status == 404
            assert (await asgi.get(world.app, f"/v1/{path}", headers=auth("one"))).status == 200
            assert (await asgi.get(world.app, f"/v1/{path}")).status == 401
        counted = await asgi.get(world.app, "/metrics", headers=auth("one"))
        tenant = digests[0][:16]
        assert f'kind="prompt",model="gen",tenant="{tenant}"}} 7' in counted.body.decode()


@pytest.mark.parametrize(
    ("body", "headers", "status"),
    [
        (form(b"x", purpose="fine-tune"), HEADERS, 400),
        (form(b"x", name="other"), HEADERS, 400),
        (form(b"x")[:-20], HEADERS, 400),
        (b"nonsense", HEADERS, 400),
        (b"{}", {"content-type": "application/json"}, 400),
        (form(b"x" * 2000), HEADERS, 413),
    ],
)
async def test_wrong_uploads_are_refused_and_leave_nothing(
    store: BatchStore, body: bytes, headers: dict[str, str], status: int
) -> None:
    limits = {"max_file_bytes": 1024}
    async with gateway_world(batch_store=store, batches=limits) as world:
        answer = await asgi.call(world.app, "POST", "/v1/files", body, headers)
        assert answer.status == status, answer.body
        assert "error" in answer.json()
    assert not list(store.part("").parent.glob("*"))


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"endpoint": "/v1/messages"}, "endpoint"),
        ({"completion_window": "1m"}, "completion_window"),
        ({"completion_window": "999h"}, "completion_window"),
        ({"input_file_id": "file-x"}, "file_id"),
        ({"metadata": {str(number): "" for number in range(17)}}, "metadata"),
        ({"metadata": {"a": "b" * 513}}, "metadata"),
        ({"input_file_id": 1}, None),
    ],
)
async def test_invalid_batches_name_the_field(
    store: BatchStore, fields: dict[str, Any], param: str | None
) -> None:
    async with gateway_world(batch_store=store) as world:
        answer = await create(world, "file-x", **fields)
        assert answer.status in (400, 404)
        assert answer.json()["error"]["param"] == param


async def test_without_batches_the_paths_do_not_exist() -> None:
    async with gateway_world() as world:
        assert (await asgi.get(world.app, "/v1/batches")).status == 404


async def test_the_document_describes_the_paths_and_their_answers(store: BatchStore) -> None:
    async with gateway_world(batch_store=store) as world:
        await world.add("gen", "gen-1")
        document = (await asgi.get(world.app, "/openapi.json")).json()
        assert document["paths"].keys() >= BATCH_PATHS.keys()
        file = await upload(world, [line(1)])
        batch = await until(world, (await create(world, file)).json()["id"], "completed")
        answers = {
            "/v1/files": "/v1/files",
            "/v1/files/{file_id}": f"/v1/files/{file}",
            "/v1/batches": "/v1/batches",
            "/v1/batches/{batch_id}": f"/v1/batches/{batch['id']}",
        }
        for route, path in answers.items():
            (content,) = document["paths"][route]["get"]["responses"]["200"]["content"].values()
            schema = {**content["schema"], "components": document["components"]}
            jsonschema.validate((await asgi.get(world.app, path)).json(), schema)
