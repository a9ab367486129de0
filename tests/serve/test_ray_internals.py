"""Private names of Ray: each exists in the installed release, and a missing one is reported."""

import asyncio
import json
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cluster import haproxy_internals, ray_internals, serve_internals
from cluster.errors import RayIncompatibleError
from cluster.launch import ray_helper
from cluster.ray_internals import PrivateName

ROOT = Path(__file__).parents[2]
MODULES = [ray_internals, serve_internals, haproxy_internals]
NAMES = [
    *(*ray_internals.EXPORTED.values(), *serve_internals.EXPORTED.values()),
    *(private for module in MODULES for private in module.MEMBERS),
]


@pytest.mark.parametrize("private", NAMES, ids=lambda private: private.path)
def test_the_installed_ray_has(private: PrivateName) -> None:
    ray_internals.resolve(private)


def test_the_names_were_read_from_the_installed_release() -> None:
    assert version("ray") == ray_internals.RAY_VERSION


def test_the_gcs_has_limited_time_to_accept_a_drain(monkeypatch: pytest.MonkeyPatch) -> None:
    from ray.experimental import internal_kv

    seen: dict[str, float] = {}

    def drain_node(*_args: object, timeout: float) -> tuple[bool, str]:
        seen["timeout"] = timeout
        return False, "busy"

    gcs = SimpleNamespace(drain_node=drain_node)
    monkeypatch.setattr(internal_kv, "internal_kv_get_gcs_client", lambda: gcs)
    assert ray_internals.drain_node("ab", "why", 3.0) == "busy"
    assert seen == {"timeout": 3.0}


def test_the_key_value_client_has_the_methods_in_use() -> None:
    from ray._raylet import InnerGcsClient  # the client passes on what it does not define

    for method in ("internal_kv_put", "internal_kv_multi_get", "get_all_node_info"):
        assert hasattr(InnerGcsClient, method), method


def test_nodes_without_room_for_a_replica_are_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    from ray.core.generated.gcs_pb2 import GcsNodeInfo
    from ray.experimental import internal_kv

    nodes = {
        name: GcsNodeInfo(state=state, resources_total=resources)
        for name, state, resources in (
            ("head", GcsNodeInfo.ALIVE, {"CPU": 1.0}),
            ("worker", GcsNodeInfo.ALIVE, {"CPU": 64.0}),
            ("without cores", GcsNodeInfo.ALIVE, {"GPU": 1.0}),
            ("dead", GcsNodeInfo.DEAD, {"CPU": 64.0}),
        )
    }
    client = SimpleNamespace(get_all_node_info=lambda timeout: nodes)
    monkeypatch.setattr(internal_kv, "internal_kv_get_gcs_client", lambda: client)
    assert [ray_internals.count_cpu_nodes(cpus, 1.0) for cpus in (0, 1, 2, 65)] == [2, 2, 1, 0]


@pytest.mark.parametrize(
    ("private", "missing"),
    [
        (PrivateName("ray.no_such_module:x", "tests"), "`ray.no_such_module:x`"),
        (PrivateName("json:Absent", "tests"), "`json:Absent`"),
        (PrivateName("json:JSONDecoder.absent", "tests"), "`json:JSONDecoder.absent`"),
        (PrivateName("json:dumps", "tests", "obj absent"), "parameter `absent` of `json:dumps`"),
    ],
)
def test_a_missing_name_is_reported_with_ray_version_and_purpose(
    private: PrivateName, missing: str
) -> None:
    with pytest.raises(RayIncompatibleError, match=re.escape(missing)) as caught:
        ray_internals.resolve(private)
    assert f"Ray {version('ray')} does not have" in str(caught.value)
    assert "(tests)" in str(caught.value)


@pytest.mark.parametrize("module", [ray_internals, serve_internals])
def test_unknown_attributes_raise_attribute_error(module: Any) -> None:
    with pytest.raises(AttributeError, match="nothing"):
        module.nothing  # noqa: B018


def test_importing_the_modules_does_not_import_ray() -> None:
    imports = "cluster.serve_internals, cluster.haproxy_internals"
    code = f"import sys, {imports}; print('ray' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


def test_no_other_module_uses_private_names() -> None:
    private = re.compile(r"\bray(\.\w+)*\._\w+|internal_kv\b|\._init\(")
    users = [
        str(path.relative_to(ROOT))
        for folder in ("cluster", "deployments")
        for path in (ROOT / folder).rglob("*.py")
        if private.search(path.read_text())
    ]
    assert sorted(users) == [
        "cluster/haproxy_internals.py",
        "cluster/ray_internals.py",
        "cluster/serve_internals.py",
    ]


def test_the_dashboard_has_all_modules_in_use(monkeypatch: pytest.MonkeyPatch) -> None:
    from ray._private import ray_constants, services
    from ray.dashboard.subprocesses.module import SubprocessModule
    from ray.dashboard.utils import get_all_modules

    existing = {cls.__name__ for cls in get_all_modules(SubprocessModule) if cls.is_enabled()}
    assert existing - set(ray_internals.DASHBOARD_MODULES) == {"DataHead", "TrainHead"}
    assert set(ray_internals.DASHBOARD_MODULES) <= existing

    started: dict[str, list[str]] = {}

    def start_ray_process(command: list[str], process_type: str, **_options: Any) -> None:
        started[process_type] = command

    monkeypatch.setattr(services, "start_ray_process", start_ray_process)
    ray_internals.limit_helpers()
    forked = []
    for process_type in (
        ray_constants.PROCESS_TYPE_MONITOR,
        ray_constants.PROCESS_TYPE_LOG_MONITOR,
    ):
        forked.append([f"{process_type}.py", "-a"])
        found = services.start_ray_process(["python", "-u", *forked[-1]], process_type)
        assert found.process.pid
    services.start_ray_process(["raylet"], ray_constants.PROCESS_TYPE_RAYLET, fate_share=True)
    command = ["python", "-u", "dashboard.py", "-b"]
    services.start_ray_process(command, ray_constants.PROCESS_TYPE_DASHBOARD)
    modules = ",".join(ray_internals.DASHBOARD_MODULES)
    run = ["python", "-u", "-P", "-m", ray_internals.HELPER_MODULE, json.dumps(forked)]
    assert started == {
        ray_constants.PROCESS_TYPE_RAYLET: ["raylet"],
        ray_constants.PROCESS_TYPE_DASHBOARD: [
            *(*run, "dashboard.py", "-b", f"--modules-to-load={modules}")
        ],
    }


@pytest.mark.parametrize(("ends", "pause_s"), [(False, ray_helper.HEALTH_PAUSE_S), (True, 2)])
async def test_the_dashboard_pauses_after_each_check_unless_the_module_ends(
    monkeypatch: pytest.MonkeyPatch, ends: bool, pause_s: float
) -> None:
    handle = ray_internals.SubprocessModuleHandle
    checks: list[Any] = []
    pauses_s: list[float] = []

    async def check(_handle: Any) -> None:
        checks.append(_handle)

    async def sleep(pause_s: float) -> None:
        pauses_s.append(pause_s)

    monkeypatch.setattr(handle, "_do_once_health_check", check)
    ray_helper.lengthen_pauses("dashboard.py")
    monkeypatch.setattr(asyncio, "sleep", sleep)
    module = SimpleNamespace(process=SimpleNamespace(exitcode=1 if ends else None))
    await handle._do_once_health_check(module)
    assert (checks, sum(pauses_s)) == ([module], pause_s)
