import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import psutil
import pytest
import yaml
from packaging.requirements import Requirement
from typer.testing import CliRunner

from cluster.cli.app import app
from cluster.config import file as config_file
from cluster.config import parse
from cluster.config.file import LoadedConfig
from cluster.launch import state
from cluster.launch.doctor import machine, running, software
from cluster.launch.doctor.finding import Finding
from cluster.launch.processes import ClusterProcess

GIB = 1024**3
SIM = {"generators": [{"name": "gen", "model": "m", "engine": "sim"}]}


def levels(findings: Any) -> list[str]:
    return [finding.level for finding in findings]


def loaded(host: str = "127.0.0.1", port: int = 1, **router: Any) -> LoadedConfig:
    config = parse({**SIM, "router": router})
    return LoadedConfig(Path("x"), {}, "tandem", config, host, port)


def test_every_problem_comes_with_advice() -> None:
    bad = [
        software.check_python((3, 9)),
        machine.check_memory(GIB),
        machine.check_memory(4 * GIB),
        machine.check_shared_memory(0, GIB),
        machine.check_disk(Path("/"), GIB, 100 * GIB),
        machine.check_disk(Path("/"), 4 * GIB, 50 * GIB),
        running.check_skew(5.0),
        running.check_clock_steps(10.0),
        running.check_discovery(httpx.Response(503)),
        running.check_discovery(httpx.Response(200, json={"error": "x"})),
        running.check_discovery(httpx.Response(200, json=[])),
    ]
    assert all(finding.advice for finding in bad)
    assert levels(bad) == [
        *("fail", "fail", "warn", "warn", "fail", "warn"),
        *("warn", "warn", "fail", "fail", "warn"),
    ]


def test_checks_without_problems_are_reported() -> None:
    targets = [{"targets": ["127.0.0.1:1", "127.0.0.1:2"], "labels": {}}]
    good = [
        software.check_python((3, 11)),
        machine.check_memory(9 * GIB),
        machine.check_shared_memory(GIB, GIB),
        machine.check_disk(Path("/"), 50 * GIB, 100 * GIB),
        running.check_skew(-0.9),
        running.check_clock_steps(0.01),
        running.check_discovery(httpx.Response(200, json=targets)),
    ]
    assert set(levels(good)) == {"ok"}
    assert "2 targets" in good[-1].message


def test_installed_versions_are_compared_with_requirements() -> None:
    wanted = [Requirement("ray[serve]==2.60.0"), Requirement("torch>=2.11"), Requirement("x")]
    found = {"ray": "2.59.0", "torch": "2.13.0+cpu", "x": None}
    ray, torch, missing = software.check_versions("tandem", wanted, found)
    assert (ray.level, torch.level, missing.level) == ("fail", "ok", "fail")
    assert "2.59.0" in ray.message
    assert "==2.60.0" in ray.message


def test_a_local_build_satisfies_a_pin_of_its_public_version() -> None:
    pinned = [Requirement("torch==2.13.0"), Requirement("torch==2.13.0+cpu")]
    assert levels(software.check_versions("vllm", pinned, {"torch": "2.13.0+cpu"})) == ["ok", "ok"]
    assert levels(software.check_versions("vllm", pinned[1:], {"torch": "2.13.0"})) == ["fail"]


class Nvml:
    """Fake of the module ``pynvml``."""

    class NVMLError(Exception):
        pass

    def __init__(self, gpus: int = 1, cuda: int = 12080, driver: bool = True) -> None:
        self.gpus, self.cuda, self.driver = gpus, cuda, driver
        self.open = 0

    def nvmlInit(self) -> None:  # noqa: N802
        if not self.driver:
            raise self.NVMLError("Driver Not Loaded")
        self.open += 1

    def nvmlShutdown(self) -> None:  # noqa: N802
        self.open -= 1

    def nvmlSystemGetCudaDriverVersion(self) -> int:  # noqa: N802
        return self.cuda

    def nvmlSystemGetDriverVersion(self) -> str:  # noqa: N802
        return "570.1"

    def nvmlDeviceGetCount(self) -> int:  # noqa: N802
        return self.gpus

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:  # noqa: N802
        return index

    def nvmlDeviceGetMemoryInfo(self, handle: int) -> Any:  # noqa: N802
        if handle:
            raise self.NVMLError("GPU is lost")
        return SimpleNamespace(free=70 * GIB, total=80 * GIB)

    def nvmlDeviceGetName(self, handle: int) -> str:  # noqa: N802
        return "H100"


@pytest.mark.parametrize(
    ("nvml", "torch_cuda", "needed", "found"),
    [
        (Nvml(), "12.8", True, ["ok", "ok"]),
        (Nvml(), "13.0", True, ["fail", "ok"]),
        (Nvml(cuda=13000), "12.8", False, ["ok", "ok"]),
        (Nvml(), None, True, ["warn", "ok"]),
        (Nvml(gpus=2), "12.8", True, ["ok", "ok", "fail"]),
        (Nvml(driver=False), "12.8", True, ["fail"]),
        (Nvml(driver=False), None, False, ["ok"]),
    ],
)
def test_gpus_and_their_driver(
    nvml: Any, torch_cuda: str | None, needed: bool, found: list[str]
) -> None:
    assert levels(machine.check_gpus_with(nvml, torch_cuda, needed=needed)) == found
    assert nvml.open == 0


def test_missing_models_are_named(tmp_path: Path) -> None:
    config = parse(
        {
            "generators": [{"name": "a", "model": str(tmp_path)}],
            "classifiers": [{"name": "b", "model": str(tmp_path / "nothing")}],
        }
    )
    there, missing = machine.check_models(config)
    assert (there.level, missing.level) == ("ok", "fail")
    assert "nothing" in missing.message


def test_missing_authentication_is_reported(tmp_path: Path) -> None:
    nowhere = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(tmp_path / "none")}
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "t"}
    assert levels(running.check_auth(nowhere, loaded())) == ["fail", "ok"]
    assert levels(running.check_auth(token, loaded())) == ["ok", "ok"]
    assert levels(running.check_auth({}, loaded("0.0.0.0"))) == ["warn", "fail"]
    assert levels(running.check_auth(token, loaded("0.0.0.0", open=True))) == ["ok", "warn"]
    for keys in (
        {"api_keys_sha256": ["0" * 64]},
        {"operator_keys_sha256": ["0" * 64]},
        {"keys_file": "keys.yaml"},
    ):
        assert levels(running.check_auth(token, loaded("0.0.0.0", **keys))) == ["ok", "ok"]


@pytest.mark.parametrize(
    ("token", "anonymous", "response", "found", "text"),
    [
        (None, 200, 200, [], ""),
        (None, 401, 401, ["fail"], "this shell has none"),
        ("mine", 401, 403, ["fail"], "rejects"),
        ("mine", 401, 200, ["ok"], "accepts"),
        ("mine", 200, 200, ["fail"], "requires no token"),
    ],
)
def test_the_shell_needs_the_token_of_the_cluster(
    token: str | None, anonymous: int, response: int, found: list[str], text: str
) -> None:
    findings = [*running.check_token(token, httpx.Response(anonymous), httpx.Response(response))]
    assert levels(findings) == found
    assert all(text in finding.message for finding in findings)


def test_doctor_uses_the_configuration_of_the_running_cluster(config: str, tmp_path: Path) -> None:
    set_port = ["http_options.port=8123"]
    url = "http://127.0.0.1:8123"
    known = state.ClusterState("id", "tandem", url, url, "", config, 0.0, overrides=set_port)
    state.save(tmp_path / "home", known)
    assert "8123 (HTTP)" in CliRunner().invoke(app, ["doctor"]).stdout
    named = CliRunner().invoke(app, ["doctor", "--config", config])
    assert "8000 (HTTP)" in named.stdout


def owned(name: str) -> ClusterProcess:
    return ClusterProcess(psutil.Process(os.getpid()), name, "id")


def test_processes_without_a_head_are_leftovers_of_a_crash(tmp_path: Path) -> None:
    home = tmp_path / "home"
    cases = [((), "ok"), (("gcs_server", "raylet"), "ok")]
    cases += [(("raylet",), "fail"), (("gcs_server",), "fail")]  # the other one died
    for names, level in cases:
        found = [owned(name) for name in names]
        alive = state.is_alive(found, None)
        first = next(iter(running.check_processes(home, found, alive=alive)))
        assert first.level == level
    assert "tandem down" in first.advice


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("TANDEM_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(config_file, "_check_serve_level", lambda config: None)
    path = tmp_path / "config.yaml"
    applications = [{"name": "tandem", "import_path": "deployments.app:build", "args": SIM}]
    path.write_text(yaml.safe_dump({"applications": applications}))
    return str(path)


def test_the_command_prints_all_findings_and_fails_if_one_does(
    config: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = CliRunner().invoke(app, ["doctor", "--config", config, "--json"])
    found = [Finding(**finding) for finding in json.loads(done.stdout)]
    assert {f.check for f in found} >= {
        *("python", "ray", "torch", "processes", "ports", "memory", "shared memory", "disk"),
        *("gpu", "authentication", "clock"),
    }
    assert done.exit_code == any(f.level == "fail" for f in found)
    assert not [f for f in found if "check failed" in f.message]

    def broken(*args: object) -> Any:
        raise ZeroDivisionError

    monkeypatch.setattr("cluster.launch.doctor.machine.check_models", broken)
    done = CliRunner().invoke(app, ["doctor", "--config", config])
    assert done.exit_code == 1
    assert "check failed" in done.stdout
    assert "clock: " in done.stdout
