"""``tandem up`` and ``down`` with real Ray and the simulated engine."""

import contextlib
import fcntl
import json
import os
import signal
import ssl
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
import pytest
import yaml

from cluster.launch import processes
from cluster.launch.environment import sockets_dir
from cluster.models.store import models_dir
from tests.certificates import certificates
from tests.cluster.conftest import (
    ROOT,
    TANDEM,
    RunningCluster,
    isolated_home,
    link_models,
    serve_config,
    wait_until,
)

FOREIGN_RAY = """
import sys, ray
ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False)
print("ready", flush=True)
for _ in sys.stdin:
    print(ray.get(ray.remote(lambda: "alive").remote()), flush=True)
"""


@pytest.fixture(scope="module")
def foreign_ray() -> Iterator[subprocess.Popen[str]]:
    """Ray cluster not started by Tandem; it runs a task for each line on its stdin."""
    env = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", FOREIGN_RAY],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=env,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    yield process
    process.communicate()


def is_alive(ray: subprocess.Popen[str]) -> bool:
    assert ray.stdin is not None
    assert ray.stdout is not None
    ray.stdin.write("\n")
    ray.stdin.flush()
    return ray.stdout.readline() == "alive\n"


def write_config(directory: Path, **sim: Any) -> Path:
    generator = {"name": "sim", "model": "sim", "engine": "sim", "sim": sim}
    path = directory / "config.yaml"
    path.write_text(yaml.safe_dump(serve_config(generators=[generator])))
    return path


def test_down_after_a_crash_ends_only_processes_of_the_cluster(
    sims: RunningCluster, foreign_ray: subprocess.Popen[str]
) -> None:
    """The last test of ``sims``."""
    sockets = {sockets_dir(owned.cluster_id) / "haproxy.cfg" for owned in processes.find(sims.home)}
    with decoy(sims.env) as bystander:
        for owned in processes.find(sims.home):
            if owned.name == "raylet":  # its workers end with it; the GCS, for example, does not
                owned.process.kill()
        wait_until(
            lambda: "The cluster has crashed" in sims.tandem("status").stdout, 60, "the crash"
        )
        done = sims.tandem("down")
        assert done.returncode == 0, done.stderr
        assert done.stdout.startswith("Stopped ")
        assert processes.find(sims.home) == []
        assert bystander.poll() is None
    assert is_alive(foreign_ray)
    assert sims.tandem("down").stdout == "No cluster is running.\n"
    assert sockets
    assert [path for path in sockets if path.exists()] == []


@contextlib.contextmanager
def decoy(env: dict[str, str]) -> Iterator[subprocess.Popen[bytes]]:
    """Process with the cluster's home in its environment, but without its id."""
    process = subprocess.Popen(["sleep", "600"], env=env)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


@dataclass(frozen=True)
class Foreground:
    """``tandem up`` in the foreground."""

    cluster: RunningCluster
    certificate: str
    """File with the CA of its certificate."""
    process: subprocess.Popen[bytes]
    file: Path
    """Output of the process."""

    def output(self) -> str:
        return self.file.read_text(encoding="utf-8")

    def is_started(self) -> bool:
        assert self.process.poll() is None, self.output()
        return "Press Ctrl-C to stop." in self.output()


@pytest.fixture(scope="module")
def foreground(
    foreign_ray: subprocess.Popen[str], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Foreground]:
    """Start a cluster for the tests up to the one that presses Ctrl-C, in this order."""
    home = link_models(tmp_path_factory.mktemp("home"))
    directory = tmp_path_factory.mktemp("config")
    env, settings, http_url, ray_address = isolated_home(home)
    http_url = http_url.replace("http://", "https://")
    config = write_config(directory, decode_s_per_token=0.05)
    tls = certificates(directory / "tls")
    env["SSL_CERT_FILE"] = authority = tls["RAY_TLS_CA_CERT"]
    for field, variable in (("certificate", "CERT"), ("key", "KEY")):
        settings += ["--set", f"router.tls.{field}={tls[f'RAY_TLS_SERVER_{variable}']}"]
    command = [TANDEM, "up", "--config", str(config), *settings]
    file = directory / "output"
    with file.open("wb") as output:
        process = subprocess.Popen(command, env=env, cwd=ROOT, stdout=output, stderr=output)
    cluster = RunningCluster(home, env, http_url, ray_address)
    started = Foreground(cluster, authority, process, file)
    try:
        wait_until(started.is_started, 240, "the start")
        yield started
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
        process.wait(240)


@pytest.fixture
def running(foreground: Foreground) -> RunningCluster:
    return foreground.cluster


def test_status_shows_every_replica_and_its_process(running: RunningCluster) -> None:
    found: dict[str, Any] = {}
    marked: set[int] = set()

    def agree() -> bool:  # Ray may start or end a process at any time
        found.update(running.status())
        marked.clear()
        marked.update(owned.process.pid for owned in processes.find(running.home))
        return found["num_processes"] - len(marked) in (0, 1)  # the starter may just be exiting

    wait_until(agree, 60, "counting the processes")
    assert found["running"]
    assert found["application"]["status"] == "RUNNING"
    deployments = {d["name"]: d for d in found["application"]["deployments"]}
    assert set(deployments) == {"router", "generator-sim"}
    for deployment in deployments.values():
        (replica,) = deployment["replicas"]
        assert replica["state"] == "RUNNING"
        assert replica["pid"] in marked
    shown = running.tandem("status").stdout
    assert running.http_url in shown
    assert "HEALTHY 1/1" in shown


def test_every_child_process_has_the_cluster_id(running: RunningCluster) -> None:
    names = {owned.name for owned in processes.find(running.home)}
    assert {"gcs_server", "raylet", "haproxy"} <= names

    def have_id() -> bool:
        marked = processes.find(running.home)
        children: set[int] = set()
        for owned in marked:
            with contextlib.suppress(psutil.NoSuchProcess):
                children.update(
                    child.pid
                    for child in owned.process.children()
                    if child.status() != psutil.STATUS_ZOMBIE
                )
        return children <= {owned.process.pid for owned in marked}

    wait_until(have_id, 60, "finding the ids")  # some processes start and end in between


def test_all_ports_are_on_loopback(running: RunningCluster) -> None:
    listening = []
    for owned in processes.find(running.home):
        with contextlib.suppress(psutil.NoSuchProcess):
            listening += [
                (owned.name, connection.laddr.ip, connection.laddr.port)
                for connection in owned.process.net_connections("inet")
                if connection.status == psutil.CONN_LISTEN
            ]
    assert len(listening) > 10
    loopback = {"127.0.0.1", "::ffff:127.0.0.1", "::1"}
    assert [found for found in listening if found[1] not in loopback] == []


def test_https_clients_verify_the_certificate(foreground: Foreground) -> None:
    url, authority = foreground.cluster.http_url, foreground.certificate
    trusted = httpx.Client(verify=ssl.create_default_context(cafile=authority), trust_env=False)
    with trusted, openai.OpenAI(base_url=f"{url}/v1", api_key="-", http_client=trusted) as client:
        prompt: Any = {"model": "sim", "prompt": "Hello", "max_tokens": 5}
        chunks = list(client.completions.create(**prompt, stream=True))
        assert len(chunks) >= 5
    command = ["curl", "--silent", "--show-error", "--fail", f"{url}/v1/models"]
    for option in ("--http1.1", "--http2"):
        found = subprocess.check_output([*command, option, "--cacert", authority])
        assert json.loads(found)["data"][0]["id"] == "sim"
    with (
        httpx.Client(trust_env=False) as stranger,
        pytest.raises(httpx.ConnectError, match="CERTIFICATE_VERIFY_FAILED"),
    ):
        stranger.get(f"{url}/v1/models")
    with httpx.Client(trust_env=False) as plain, pytest.raises(httpx.RemoteProtocolError):
        plain.get(f"{url.replace('https', 'http')}/v1/models")


def test_chat_over_a_pipe_streams_an_answer(running: RunningCluster) -> None:
    done = subprocess.run(
        [TANDEM, "chat", "--max-tokens", "5"],
        input="Hello\n",
        env=running.env,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip()


def test_a_second_up_reports_the_running_cluster(running: RunningCluster) -> None:
    done = running.tandem("up", "-d")
    assert done.returncode == 1
    assert "error: a cluster has been running for " in done.stderr
    assert f"at {running.http_url}. See `tandem status`" in done.stderr
    assert running.status()["running"]


def test_up_on_a_busy_port_names_port_and_process(
    running: RunningCluster, tmp_path: Path, foreign_ray: subprocess.Popen[str]
) -> None:
    env, settings, *_ = isolated_home(tmp_path)
    port = running.http_url.rpartition(":")[2]
    command = [TANDEM, "up", "-d", *settings, "--set", f"http_options.port={port}"]
    config = ["--config", str(write_config(tmp_path))]
    done = subprocess.run([*command, *config], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert f"port {port} (HTTP) is in use by another Tandem cluster, process " in done.stderr
    assert "haproxy" in done.stderr
    assert done.stderr.count("\n") == 1
    assert running.status()["running"]
    assert processes.find(tmp_path) == []


def test_ctrl_c_drains_requests_and_ends_all_processes(
    foreground: Foreground, foreign_ray: subprocess.Popen[str]
) -> None:
    process, cluster = foreground.process, foreground.cluster
    with (
        httpx.Client(
            base_url=cluster.http_url,
            timeout=60,
            verify=ssl.create_default_context(cafile=foreground.certificate),
        ) as http,
        http.stream("POST", "/v1/completions", json=stream_of(60)) as response,
    ):
        lines = response.iter_lines()
        next(lines)
        process.send_signal(signal.SIGINT)
        rest = [line for line in lines if line]
    assert rest[-1] == "data: [DONE]"
    assert process.wait(240) == 0, foreground.output()
    assert "all requests finished" in foreground.output()
    assert processes.find(cluster.home) == []
    assert is_alive(foreign_ray)


def stream_of(tokens: int) -> dict[str, Any]:
    prompt = {"model": "sim", "prompt": "Hello", "stream": True}
    return {**prompt, "max_tokens": tokens, "ignore_eos": True}


def test_a_failed_start_reports_the_cause_and_stops_all_processes(tmp_path: Path) -> None:
    env, settings, *_ = isolated_home(tmp_path)
    config = write_config(tmp_path, fail_startup=True)
    done = subprocess.run(
        [TANDEM, "up", "-d", "--config", str(config), *settings],
        env=env,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: the application failed to start: generator-sim: ")
    assert processes.find(tmp_path) == []
    assert json.loads(subprocess.check_output([TANDEM, "status", "--json"], env=env)) == {
        "running": False
    }


def test_the_generator_answers_while_the_classifier_is_built(tmp_path: Path) -> None:
    env, settings, http_url, _ = isolated_home(tmp_path)
    model = "sentiment-minilm"
    (tmp_path / "models").mkdir()
    config = yaml.safe_load(write_config(tmp_path).read_text())
    classifier = {"name": "sentiment", "model": model}
    config["applications"][0]["args"]["classifiers"] = [classifier]
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(config))
    command = [TANDEM, "up", "-d", "--config", str(file), *settings]
    with (tmp_path / "models" / f".{model}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # as a build does
        up = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True)
        try:
            wait_until(lambda: answers(http_url), 240, "an answer of the generator")
            assert up.poll() is None
            (tmp_path / "models" / model).symlink_to(models_dir() / model)
            fcntl.flock(lock, fcntl.LOCK_UN)
            output, _ = up.communicate(timeout=240)
            assert up.returncode == 0, output
            assert f"{model}: already built" in output
            texts = {"model": "sentiment", "input": "Fine."}
            assert httpx.post(f"{http_url}/classify", json=texts, timeout=60).status_code == 200
        finally:
            up.terminate()
            up.communicate()
            subprocess.run([TANDEM, "down"], env=env, check=True, capture_output=True)
    assert processes.find(tmp_path) == []


def answers(http_url: str) -> bool:
    body = {"model": "sim", "prompt": "Hello", "max_tokens": 1}
    try:
        return httpx.post(f"{http_url}/v1/completions", json=body, timeout=10).status_code == 200
    except httpx.TransportError:
        return False
