"""``/v1/keys`` and ``/v1/logs``, which ``tandem --address URL keys`` and ``logs`` use."""

import asyncio
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cluster.config import RouterConfig
from cluster.errors import InvalidRequestError, StartError, UnavailableError, UnsupportedError
from cluster.key_file import NewKey, add_key, list_keys, read_keys
from cluster.launch import remote_logs
from cluster.operator_api import KEYS_PATH, LOGS_PATH
from cluster.ray_internals import RayNode
from deployments import operations
from tests import asgi
from tests.serve.gateway_kit import World, gateway_world
from tests.serve.test_cli_http import FakeRouter, router, run  # noqa: F401, a fixture

OPERATOR = {"authorization": "Bearer operator"}
DIGEST = sha256(b"operator").hexdigest()
ENTRY = {"file": "10.0.0.1/serve/router.log", "time": "2026-01-02T03:04:05", "text": "INFO id-1"}
OVERVIEW: dict[str, Any] = {
    "bytes": {"10.0.0.1/serve/router.log": 2048},
    "failed_requests": [
        {
            **{"model": "gen", "replica": "", "status": 503, "outcome": "failed"},
            **{"count": 2, "last_id": "4f1", "last_time": "2026-01-02"},
        }
    ],
    "errors": [ENTRY],
    "problems": ["logs of node 10.0.0.3 cannot be read"],
}


def entries(number: int, *, truncated: bool = False) -> dict[str, Any]:
    return {
        **{"entries": [ENTRY] * number, "truncated": truncated},
        "problems": OVERVIEW["problems"],
    }


class Control:
    """Key file and logs of a cluster."""

    def __init__(self, path: Path) -> None:
        self.path = path

    async def read_logs(self, request_id: str | None) -> dict[str, Any]:
        return OVERVIEW if request_id is None else entries(request_id == "id-1")

    async def list_keys(self) -> list[dict[str, Any]]:
        return list_keys(self.path)

    async def add_key(self, new: NewKey, limits: Mapping[str, float | None]) -> str:
        return add_key(self.path, new, limits)

    async def revoke_key(self, key_id: str) -> tuple[str, str]:
        raise UnsupportedError("The keys are in a file on each node.")


async def call(world: World, method: str, path: str, body: Any = None, **headers: str) -> Any:
    answer = await asgi.start(world.app, method, path, body, {**OPERATOR, **headers}).done()
    return answer.status, answer.json()


async def test_an_operator_creates_lists_and_revokes_keys(tmp_path: Path) -> None:
    control = Control(tmp_path / "keys.yaml")
    async with gateway_world(control=control, operator_keys_sha256=[DIGEST]) as world:
        new = {"tenant": "acme", "models": ["gen"], "limits": {"requests_per_minute": 6}}
        new |= {"key_cost_per_day": 2.5}
        status, created = await call(world, "POST", KEYS_PATH, new)
        assert status == 200
        contents = read_keys(control.path)
        assert contents is not None
        assert contents.keys[0].sha256 == sha256(created["key"].encode()).hexdigest()
        status, listed = await call(world, "GET", KEYS_PATH)
        assert (status, [row["tenant"] for row in listed["data"]]) == (200, ["acme"])
        assert listed["data"][0]["requests_per_minute"] == 6
        budgets = listed["data"][0]["key_cost_per_day"], listed["data"][0]["cost_per_day"]
        assert budgets == (2.5, None)
        assert contents.keys[0].sha256 not in json.dumps(listed)
        id_, sha256_ = listed["data"][0]["id"], contents.keys[0].sha256
        for refused in (created["key"], id_[:4], f"{id_}0", id_.upper() + "G"):
            status, error = await call(world, "DELETE", f"{KEYS_PATH}/{refused}")
            assert (status, error["error"]["type"]) == (400, "BadRequestError")
            assert refused not in error["error"]["message"]
        for accepted in (id_, sha256_):
            assert (await call(world, "DELETE", f"{KEYS_PATH}/{accepted}"))[0] == 501
        assert (await call(world, "GET", f"{KEYS_PATH}/abc"))[0] == 405
        assert (await call(world, "POST", KEYS_PATH, {"tenants": "typo"}))[0] == 400
        assert (await call(world, "POST", KEYS_PATH, new, **{"content-type": "text/plain"}))[
            0
        ] == 400


async def test_an_operator_reads_logs(tmp_path: Path) -> None:
    async with gateway_world(control=Control(tmp_path), operator_keys_sha256=[DIGEST]) as world:
        assert await call(world, "GET", LOGS_PATH) == (200, OVERVIEW)
        assert await call(world, "GET", f"{LOGS_PATH}?request=id-1") == (200, entries(1))
        status, error = await call(world, "GET", f"{LOGS_PATH}?request=id-2")
        assert status == 404
        assert "logs of node 10.0.0.3 cannot be read" in error["error"]["message"]


@pytest.mark.parametrize("path", [KEYS_PATH, LOGS_PATH])
async def test_other_callers_are_refused(tmp_path: Path, path: str) -> None:
    async with gateway_world(
        control=Control(tmp_path), api_keys_sha256=[sha256(b"other").hexdigest()]
    ) as world:
        assert (await call(world, "GET", path, authorization="Bearer other"))[0] == 403
    async with gateway_world(control=Control(tmp_path)) as world:  # open on loopback
        assert (await call(world, "GET", path))[0] == 403
    async with gateway_world(operator_keys_sha256=[DIGEST]) as world:  # without Ray
        assert (await call(world, "GET", path))[0] == 501


# -- the command line --


def test_keys_of_another_cluster_are_changed(router: FakeRouter) -> None:  # noqa: F811
    row = {"id": "ab12", "tenant": "acme", "models": None, "requests_per_minute": 6.0}
    budgets = ("cost_per_day", "cost_per_month", "key_cost_per_day", "key_cost_per_month")
    row |= dict.fromkeys(budgets)
    router.answer = lambda path, body: (
        (200, {"key": "tandem-secret", "tenant": "acme"}) if body else (200, {"data": [row]})
    )
    done = run("--address", router.url, "keys", "add", "acme", "--requests-per-minute", "6")
    assert (done.exit_code, done.stdout) == (0, "tandem-secret\n")
    path, body = router.requests[-1]
    assert (path, body["tenant"], body["limits"]) == (KEYS_PATH, "acme", {"requests_per_minute": 6})
    assert "ab12" in run("--address", router.url, "keys", "list").stdout
    key, other = sha256(b"tandem-X").hexdigest(), "0123456789abcdef"
    rows = [{"id": key[:16]}, {"id": other}]
    router.answer = lambda path, body: (
        200,
        {"data": rows} if path == KEYS_PATH else {"id": path.split("/")[-1], "tenant": "acme"},
    )
    for argument, sent in (("0123", other), (other, other), ("tandem-X", key[:16]), (key, key)):
        done = run("--address", f"{router.url}/", "keys", "revoke", argument)
        assert done.stdout == f"revoked key {sent} of tenant acme\n"
        assert router.requests[-1] == (f"{KEYS_PATH}/{sent}", None)
    for argument in ("tandem-Y", "ffff", ""):
        done = run("--address", router.url, "keys", "revoke", argument)
        assert "no key matches" in str(done.exception) or "keys match" in str(done.exception)
        assert router.requests[-1] == (KEYS_PATH, None)
    assert run("--address", router.url, "keys", "publish").exit_code == 2


def test_logs_of_another_cluster_are_shown(router: FakeRouter) -> None:  # noqa: F811
    router.answer = lambda path, body: (200, OVERVIEW)
    done = run("--address", router.url, "logs")
    assert "2 × gen, status 503; last 2026-01-02, 4f1" in done.stdout
    assert "logs of node 10.0.0.3 cannot be read" in done.stderr
    assert json.loads(run("logs", "--url", router.url, "--json").stdout)["errors"] == [ENTRY]
    router.answer = lambda path, body: (200, entries(1))
    shown = run("--address", router.url, "logs", "--request", "id 1")
    assert shown.stdout.splitlines() == [ENTRY["file"], f"  {ENTRY['text']}"]
    assert "Only the first" not in shown.stderr
    assert router.requests[-1][0] == f"{LOGS_PATH}?request=id%201"
    router.answer = lambda path, body: (200, entries(2, truncated=True))
    shown = run("--address", router.url, "logs", "--request", "id-1")
    assert "Only the first 2 entries are shown" in shown.stderr


# -- the task on the head --


@contextmanager
def head(
    monkeypatch: pytest.MonkeyPatch, home: Path, num_nodes: int = 1, **config: Any
) -> Iterator[operations.HeadControl]:
    """Run tasks of the head here."""

    class Remote:
        def __init__(self, function: Any) -> None:
            self._function = function

        async def remote(self, *args: Any) -> Any:
            return self._function(*args)

    monkeypatch.setattr(operations.ray, "remote", lambda **_: Remote)
    nodes = [RayNode(str(i), "10.0.0.1", i == 0) for i in range(num_nodes)]
    monkeypatch.setattr(operations, "live_nodes", lambda _: nodes)
    monkeypatch.setenv("TANDEM_HOME", str(home))
    yield operations.HeadControl(lambda: RouterConfig(**config))


async def test_keys_of_the_cluster_are_changed_in_the_file_of_the_head(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    stored: list[bytes] = []
    monkeypatch.setattr(operations, "kv_put", lambda key, text, _: stored.append(text))
    with head(monkeypatch, tmp_path, 2, keys_in_cluster=True) as control:
        key = await control.add_key(NewKey("acme", 0, None, None), {"tokens_per_day": 5})
        (row,) = await control.list_keys()
        assert (row["tenant"], row["tokens_per_day"]) == ("acme", 5)
        with pytest.raises(InvalidRequestError, match="no key matches"):
            await control.revoke_key("ffff" if row["id"][0] != "f" else "aaaa")
        assert await control.revoke_key(key) == (row["id"], "acme")
        with pytest.raises(InvalidRequestError, match="priority"):
            await control.add_key(NewKey("acme", 1000, None, None), {})
    assert stored[0] == stored[1] != stored[2]


async def test_one_node_has_its_own_key_file_and_several_refuse(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    file = tmp_path / "mine.yaml"
    with head(monkeypatch, tmp_path, keys_file=str(file)) as control:
        await control.add_key(NewKey("acme", 0, None, None), {})
    assert read_keys(file) is not None
    with (
        head(monkeypatch, tmp_path, 2, keys_file=str(file)) as control,
        pytest.raises(UnsupportedError, match=r"router\.keys_file"),
    ):
        await control.list_keys()


async def test_a_head_that_fails_is_reported(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def fail(error: Exception) -> None:
        raise error

    with head(monkeypatch, tmp_path) as control:
        for error in (StartError("no dashboard"), OSError("broken")):
            monkeypatch.setattr(operations, "_list_keys", lambda _, error=error: fail(error))
            with pytest.raises(UnavailableError, match=r"no dashboard|broken"):
                await control.list_keys()


async def test_a_task_that_takes_too_long_is_cancelled(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    cancelled: list[tuple[Any, bool]] = []
    task: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
    with head(monkeypatch, tmp_path) as control:
        monkeypatch.setattr(
            operations.ray, "remote", lambda **_: lambda _: SimpleNamespace(remote=lambda *_: task)
        )
        monkeypatch.setattr(
            operations.ray, "cancel", lambda ref, force: cancelled.append((ref, force))
        )
        monkeypatch.setattr(operations, "TIMEOUT_S", 0.01)
        with pytest.raises(UnavailableError, match=r"did not finish.*key may exist.*keys list"):
            await control.add_key(NewKey("acme", 0, None, None), {})
    assert cancelled == [(task, True)]


async def test_a_key_that_cannot_be_published_is_deleted_again(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def fail(*_: Any) -> None:
        raise OSError("GCS gone")

    monkeypatch.setattr(operations, "kv_put", fail)
    with head(monkeypatch, tmp_path, keys_in_cluster=True) as control:
        with pytest.raises(UnavailableError, match=r"GCS gone.*deleted again"):
            await control.add_key(NewKey("acme", 0, None, None), {})
        assert await control.list_keys() == []
        monkeypatch.setattr(operations, "revoke_key", fail)
        with pytest.raises(UnavailableError, match=r"key may exist.*tandem keys list"):
            await control.add_key(NewKey("acme", 0, None, None), {})


def test_entries_above_the_limit_are_left_out(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def download(url: str, token: str | None, target: Path) -> list[str]:
        log = target / "10.0.0.1" / "serve" / "router.log"
        log.parent.mkdir(parents=True)
        log.write_text("".join(f"INFO id-1 {i}\n" for i in range(3)))
        return []

    monkeypatch.setattr(operations, "read_dashboard_address", lambda *_: "10.0.0.1:8265")
    monkeypatch.setattr(remote_logs, "download_logs", download)
    for limit, is_truncated in ((3, False), (2, True)):
        monkeypatch.setattr(operations, "MAX_ENTRIES", limit)
        found = operations.read_logs("10.0.0.1:6379", "id-1")
        assert (len(found["entries"]), found["truncated"]) == (limit, is_truncated)
