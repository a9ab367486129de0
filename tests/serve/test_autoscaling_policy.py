"""The autoscaling policy in Serve's own autoscaling state, with the deployments of ``build``."""

import gc
import json
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from msgspec import structs
from ray import cloudpickle
from ray.exceptions import RpcError
from ray.serve._private import constants as serve_constants
from ray.serve._private import controller as serve_controller
from ray.serve._private import deployment_state
from ray.serve._private.autoscaling_state import ApplicationAutoscalingState
from ray.serve._private.build_app import build_app
from ray.serve._private.common import (
    DeploymentID,
    ReplicaID,
    ReplicaMetricReport,
    TimeStampedValue,
)
from ray.serve._private.config import DeploymentConfig
from ray.serve._private.deployment_info import DeploymentInfo
from ray.serve.config import AutoscalingPolicy

from cluster import ray_internals
from cluster.autoscaling.reports import Latency, LoadReport
from cluster.config.file import AUTOSCALING_POLICY
from cluster.launch.environment import cluster_environment
from cluster.rollout import RolloutState
from deployments import app as app_module
from deployments import autoscaling, decisions
from deployments.rollout_store import write_state

pytestmark = pytest.mark.filterwarnings(
    # As in deployments.app: this version of Serve has no other setting.
    "ignore:.*metrics_interval_s:DeprecationWarning",
)

POOL, ROUTER = DeploymentID("generator-sim", "tandem"), DeploymentID("router", "tandem")
ARGS = {
    "generators": [
        {
            "name": "sim",
            "model": "sim",
            "engine": "sim",
            "replicas": {
                "min": 0,
                "max": 9,
                "target_in_flight": 4,
                "upscale_delay_s": 0,
                "downscale_delay_s": 6,
            },
            "resources": {"cpus": 1},
        }
    ],
    "router": {"replicas": {"min": 1, "max": 3}, "resources": {"cpus": 1}},
    "budget": {"cpus": 6},
}
CPU_ARGS = {**ARGS, "generators": [{**ARGS["generators"][0], "engine": "vllm"}]}  # type: ignore[dict-item, index]


class Controller:
    """Autoscaling state of Serve's controller for one application, with a fake clock and GCS."""

    def __init__(
        self, monkeypatch: pytest.MonkeyPatch, *, application_policy: bool, args: Any = ARGS
    ) -> None:
        self.now = 1000.0
        monkeypatch.setattr(autoscaling.time, "monotonic", lambda: self.now)
        self.gcs: dict[bytes, bytes] = {}
        self.connect_gcs(monkeypatch)
        self.state = ApplicationAutoscalingState("tandem")
        if application_policy:
            self.state.register(AutoscalingPolicy(**AUTOSCALING_POLICY))
        self.targets = {}
        for deployment in build_app(app_module.build(args), name="tandem").deployments:
            id = DeploymentID(deployment.name, "tandem")
            # The controller receives it in this form.
            if deployment._deployment_config.autoscaling_config is None:
                continue
            proto = deployment._deployment_config.to_proto_bytes()
            info = DeploymentInfo(DeploymentConfig.from_proto_bytes(proto), None, 0, "")
            self.targets[id] = self.state.register_deployment(id, info, 1)

    def report(self, id: DeploymentID, replica: str, values: dict[str, float]) -> None:
        at = time.time()
        metrics = {name: [TimeStampedValue(at, value)] for name, value in values.items()}
        report = ReplicaMetricReport(ReplicaID(replica, id), metrics, at)
        self.state.record_request_metrics_for_replica(report)

    def run(self, id: DeploymentID, *replicas: str) -> None:
        self.state.update_running_replica_ids(id, [ReplicaID(name, id) for name in replicas])

    def connect_gcs(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def put(key: bytes, value: bytes, timeout_s: float) -> None:
            self.gcs[key] = value

        def get_many(keys: list[bytes], timeout_s: float) -> list[bytes]:
            return [self.gcs[key] for key in keys if key in self.gcs]

        monkeypatch.setattr(ray_internals, "kv_put", put)
        monkeypatch.setattr(ray_internals, "kv_get_many", get_many)

    def step(self) -> dict[DeploymentID, int]:
        self.now += autoscaling.DECISION_INTERVAL_S
        self.targets = self.state.get_decision_num_replicas(self.targets)
        return self.targets


def busy(ongoing: float, queued: float = 0.0) -> dict[str, float]:
    report = LoadReport(
        requests_per_s=5.0,
        in_flight=ongoing,
        queued=queued,
        latencies={"ttft_p90_s": Latency(0.5, 100.0)},
    )
    return {**LoadReport(cores=0.1).flatten(""), **report.flatten("sim")}


def test_pools_follow_what_routers_report_within_the_budget(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    controller = Controller(monkeypatch, application_policy=True)
    controller.run(POOL, "a")
    controller.run(ROUTER, "r")
    assert controller.step() == {POOL: 1, ROUTER: 1}  # no reports yet
    controller.report(ROUTER, "r", busy(11.0))
    controller.report(POOL, "a", {autoscaling.IN_FLIGHT: 11.0, autoscaling.STARTUP_S: 3.0})
    assert controller.step() == {POOL: 3, ROUTER: 1}
    controller.run(POOL, "a", "b", "c")
    controller.report(ROUTER, "r", busy(80.0))
    assert controller.step() == {POOL: 5, ROUTER: 1}  # one CPU each, six in all


def test_the_controller_looks_more_often_while_replicas_start(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    start_serve(monkeypatch, autoscaling.CHANGING_INTERVAL_S)
    controller = Controller(monkeypatch, application_policy=True)
    controller.run(ROUTER, "r")
    intervals = []
    for replicas in ((), ("a",), ("a", "b"), ("a",)):  # one should run
        controller.run(POOL, *replicas)
        controller.step()
        intervals.append(serve_controller.CONTROL_LOOP_INTERVAL_S)
        assert intervals[-1] == deployment_state.CONTROL_LOOP_INTERVAL_S
    changing, steady = autoscaling.CHANGING_INTERVAL_S, autoscaling.STEADY_INTERVAL_S
    assert intervals == [changing, steady, changing, steady]


def start_serve(monkeypatch: pytest.MonkeyPatch, interval_s: float) -> None:
    """Set what Serve reads from the environment; forget the policies of other tests."""
    gc.collect()
    for module in (serve_constants, serve_controller, deployment_state):
        monkeypatch.setattr(module, "CONTROL_LOOP_INTERVAL_S", interval_s)


@pytest.mark.parametrize("application_policy", [True, False])
def test_the_controller_looks_more_often_while_any_application_changes(
    monkeypatch: pytest.MonkeyPatch, application_policy: bool
) -> None:
    start_serve(monkeypatch, autoscaling.CHANGING_INTERVAL_S)
    steady, changing = (
        Controller(monkeypatch, application_policy=application_policy) for _ in range(2)
    )
    for controller in (steady, changing):
        controller.run(ROUTER, "r")
    steady.run(POOL, "a")
    for controller in (changing, steady):
        controller.step()
        assert serve_controller.CONTROL_LOOP_INTERVAL_S == autoscaling.CHANGING_INTERVAL_S
    del changing.state  # as if deleted
    gc.collect()
    steady.step()
    assert serve_controller.CONTROL_LOOP_INTERVAL_S == autoscaling.STEADY_INTERVAL_S


@pytest.mark.parametrize("interval_s", [0.1, 2.0])
def test_the_interval_of_a_cluster_with_other_settings_stays(
    monkeypatch: pytest.MonkeyPatch, interval_s: float
) -> None:
    start_serve(monkeypatch, interval_s)
    controller = Controller(monkeypatch, application_policy=True)
    for replicas in ((), ("a",)):
        controller.run(ROUTER, "r")
        controller.run(POOL, *replicas)
        controller.step()
        assert interval_s == serve_controller.CONTROL_LOOP_INTERVAL_S


def test_clusters_of_tandem_start_with_the_shorter_interval() -> None:
    variables = cluster_environment({}, Path("/home"), "0f3a-77", haproxy=False)
    started_s = float(variables["RAY_SERVE_CONTROL_LOOP_INTERVAL_S"])
    assert started_s == autoscaling.CHANGING_INTERVAL_S


def test_the_phases_of_a_start_are_exported_and_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    unix = 5000.0
    monkeypatch.setattr(autoscaling.time, "time", lambda: unix)
    exported: dict[tuple[str, ...], float] = {}

    def export(self: autoscaling.RayMetrics) -> None:
        for labels, gauge in self.registry.series(autoscaling.table.STARTUP_SECONDS).items():
            exported[labels] = gauge.value

    monkeypatch.setattr(autoscaling.RayMetrics, "export", export)
    controller = Controller(monkeypatch, application_policy=True)
    controller.run(POOL, "a")
    controller.run(ROUTER, "r")
    controller.report(ROUTER, "r", busy(5.0))
    assert controller.step()[POOL] == 2
    unix += 12.0
    controller.run(POOL, "a", "b")
    started = {autoscaling.CREATED_AT: 5003.0, autoscaling.STARTUP_S: 8.0}
    controller.report(POOL, "b", {autoscaling.IN_FLIGHT: 0.0, **started})
    controller.step()
    phases = {labels[1]: value for labels, value in exported.items() if labels[0] == "sim"}
    assert phases == {"scheduling": 3.0, "start": 8.0, "notice": 1.0, "decision": 12.0}


def test_a_rollout_limits_the_replicas_of_both_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    rollout = {"model": "new", "version": "2"}
    pool = {**ARGS["generators"][0], "replicas": {"min": 2, "max": 4}, "rollout": rollout}  # type: ignore[dict-item, index]
    controller = Controller(
        monkeypatch, application_policy=True, args={**ARGS, "generators": [pool], "budget": {}}
    )
    new = DeploymentID("generator-sim@2", "tandem")
    assert controller.step() == {POOL: 2, new: 0, ROUTER: 1}, "no state yet"
    state = RolloutState(version="2", model="new", replicas=2, room=0, since=0.0)
    for old_replicas, new_replicas in ((1, 1), (0, 2), (None, 3)):
        changed = structs.replace(state, old_replicas=old_replicas, new_replicas=new_replicas)
        write_state("tandem", "sim", changed)
        expected = 2 if old_replicas is None else old_replicas
        assert controller.step() == {POOL: expected, new: new_replicas, ROUTER: 1}
    for other in ({"version": "1"}, {"model": "other"}):
        write_state(
            "tandem", "sim", structs.replace(state, new_replicas=4, old_replicas=0, **other)
        )
        controller.step()  # Serve goes to 0 in two steps
        assert controller.step() == {POOL: 2, new: 0, ROUTER: 1}, "another rollout"


async def test_decisions_can_be_read_with_their_reasons(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    controller = Controller(monkeypatch, application_policy=True)
    assert await decisions.read_decisions([POOL, ROUTER]) is None, "no policy ran"
    controller.run(POOL, "a")
    controller.run(ROUTER, "r")
    controller.step()
    assert await decisions.read_decisions([POOL, ROUTER]) == []
    controller.report(ROUTER, "r", busy(11.0))
    controller.step()
    (change,) = await decisions.read_decisions([POOL, ROUTER]) or ()
    assert (change.pool, change.before, change.target, change.cause) == ("sim", 1, 3, "in_flight")
    assert change.reason == "11 requests, 4 per replica, 1.15 times as many in 35 s"
    assert abs(change.time - time.time()) < 60
    assert await decisions.read_decisions([ROUTER]) == []
    log = decisions.DecisionLog()  # in a restarted controller
    limit = decisions.MAX_CHANGES
    log.record(POOL, [replace(change, target=n) for n in range(2 * limit)])
    kept = await decisions.read_decisions([POOL]) or []
    assert [one.target for one in kept] == list(range(limit, 2 * limit))


async def test_a_cpu_generator_gets_no_more_replicas_than_the_nodes_have_cores_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    controller = Controller(monkeypatch, application_policy=True, args=CPU_ARGS)
    nodes = 1

    def count_nodes(_min_cpus: float, _timeout_s: float) -> int:
        if not nodes:
            raise RpcError("no answer")
        return nodes

    monkeypatch.setattr(ray_internals, "count_cpu_nodes", count_nodes)
    controller.run(POOL, "a")
    controller.run(ROUTER, "r")

    def target_with_load(core_share: float) -> int:
        controller.report(ROUTER, "r", busy(11.0))
        controller.report(POOL, "a", {autoscaling.CORE_SHARE: core_share})
        return controller.step()[POOL]

    assert [target_with_load(1.0) for _ in range(3)] == [1, 1, 1]
    (change,) = await decisions.read_decisions([POOL]) or ()  # stored once
    assert (change.before, change.target, change.cause) == (1, 1, "cores")
    assert change.reason.endswith("no free cores for another replica")
    nodes = 2  # a node is added
    assert target_with_load(1.0) == 2
    nodes = 0  # the GCS is down
    assert target_with_load(1.0) == 2
    nodes = 2
    assert target_with_load(0.5) == 3, "two replicas fit on each node"
    assert target_with_load(0.0) == 3, "this one does not compute on CPUs"
    nodes = 1
    assert target_with_load(1.0) == 1
    controller.report(ROUTER, "r", {**LoadReport().flatten(""), **LoadReport().flatten("sim")})
    controller.step()
    target_with_load(1.0)
    changes = await decisions.read_decisions([POOL]) or ()
    assert [change.target for change in changes] == [1, 2, 3, 1, 1], "recorded at each overload"


def test_a_cpu_classifier_gets_as_many_replicas_as_its_threads_fit_on_the_nodes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pool = {key: ARGS["generators"][0][key] for key in ("replicas", "resources")}  # type: ignore[index]
    args = {**ARGS, "generators": [], "classifiers": [{"name": "sim", "model": "m", **pool}]}
    controller = Controller(monkeypatch, application_policy=True, args=args)
    monkeypatch.setattr(ray_internals, "count_cpu_nodes", lambda _min_cpus, _timeout_s: 1)
    classifier = DeploymentID("classifier-sim", "tandem")
    controller.run(ROUTER, "r")
    controller.run(classifier, "a")
    for core_share, replicas in ((1.0, 1), (0.5, 2)):
        controller.report(ROUTER, "r", busy(40.0))
        controller.report(classifier, "a", {autoscaling.CORE_SHARE: core_share})
        assert controller.step()[classifier] == replicas


def test_no_replica_is_added_before_the_cores_of_the_first_one_are_known(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    controller = Controller(monkeypatch, application_policy=True, args=CPU_ARGS)
    monkeypatch.setattr(ray_internals, "count_cpu_nodes", lambda _min_cpus, _timeout_s: 2)
    controller.run(ROUTER, "r")
    controller.report(ROUTER, "r", busy(0.0, queued=40.0))
    assert controller.step()[POOL] == 1, "the first replica starts"
    controller.run(POOL, "a")
    controller.report(ROUTER, "r", busy(40.0))
    assert controller.step()[POOL] == 1, "it has not reported"
    controller.report(POOL, "a", {autoscaling.CORE_SHARE: 1.0})
    assert controller.step()[POOL] == 2, "there is another node"


def test_a_restarted_controller_stops_no_replica_before_it_knows_the_cores(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    controller = Controller(monkeypatch, application_policy=True, args=CPU_ARGS)
    counts: list[tuple[float, int | None]] = []
    nodes: int | None = 3

    def count_nodes(min_cpus: float, _timeout_s: float) -> int:
        counts.append((min_cpus, nodes))
        if nodes is None:
            raise RpcError("no answer")
        return nodes

    monkeypatch.setattr(ray_internals, "count_cpu_nodes", count_nodes)
    controller.run(POOL, "a", "b", "c")
    controller.run(ROUTER, "r")
    controller.targets[POOL] = 3
    assert controller.step()[POOL] == 3, "nothing was reported"
    nodes = None
    controller.report(POOL, "a", {autoscaling.CORE_SHARE: 1.0})
    assert controller.step()[POOL] == 3, "the nodes are unknown"
    nodes = 1
    assert controller.step()[POOL] == 3, "the routers have not reported"
    controller.report(ROUTER, "r", busy(40.0))
    assert controller.step()[POOL] == 1
    assert counts[-1] == (1.0, 1), "nodes with the CPUs of a replica"


async def test_decisions_are_made_while_the_gcs_is_down(monkeypatch: pytest.MonkeyPatch) -> None:
    controller = Controller(monkeypatch, application_policy=True)

    def silent(*_args: Any) -> None:
        raise RpcError("no answer")

    monkeypatch.setattr(ray_internals, "kv_put", silent)
    monkeypatch.setattr(ray_internals, "kv_get_many", silent)
    controller.run(POOL, "a")
    controller.run(ROUTER, "r")
    controller.report(ROUTER, "r", busy(11.0))
    assert controller.step()[POOL] == 3
    assert await decisions.read_decisions([POOL]) is None
    controller.connect_gcs(monkeypatch)
    controller.run(POOL, "a", "b", "c")
    controller.report(ROUTER, "r", busy(80.0))
    controller.step()
    changes = await decisions.read_decisions([POOL]) or []
    assert [(one.before, one.target) for one in changes] == [(1, 3), (3, 5)]


def test_a_pool_scales_to_zero_and_back(monkeypatch: pytest.MonkeyPatch) -> None:
    controller = Controller(monkeypatch, application_policy=True)
    controller.run(POOL, "a")
    controller.run(ROUTER, "r")
    idle = {**LoadReport().flatten(""), **LoadReport().flatten("sim")}
    for _ in range(5):
        controller.report(ROUTER, "r", idle)
        controller.step()
    assert controller.targets[POOL] == 0
    controller.run(POOL)
    controller.report(ROUTER, "r", busy(0.0, queued=1.0))
    assert controller.step()[POOL] == 1


def test_missing_or_invalid_reports_change_no_target(monkeypatch: pytest.MonkeyPatch) -> None:
    controller = Controller(monkeypatch, application_policy=True)
    controller.run(POOL, "a", "b", "c")
    controller.run(ROUTER, "r")
    controller.targets[POOL] = 3
    controller.report(ROUTER, "r", busy(10.0))
    for _ in range(60):
        assert controller.step()[POOL] == 3
    controller.report(ROUTER, "r", {**busy(0.0), "sim/in_flight": float("nan")})
    for _ in range(10):
        assert controller.step()[POOL] == 3


def test_errors_do_not_reach_the_controller_and_pause_the_decisions(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    controller = Controller(monkeypatch, application_policy=True)
    controller.run(POOL, "a")
    controller.run(ROUTER, "r")

    def broken(*_args: Any) -> None:
        raise RuntimeError("a bug")

    with monkeypatch.context() as patch:
        patch.setattr(autoscaling.PoolSettings, "decode", broken)
        assert controller.step() == {POOL: 1, ROUTER: 1}
    controller.report(ROUTER, "r", busy(11.0))
    steps = [controller.step()[POOL] for _ in range(10)]
    assert steps == [1] * 9 + [3]  # paused for ten intervals


def test_without_an_application_policy_the_replicas_reports_decide(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    controller = Controller(monkeypatch, application_policy=False)
    controller.run(POOL, "a")
    controller.run(ROUTER, "r")
    controller.report(POOL, "a", {autoscaling.IN_FLIGHT: 11.0})
    controller.report(ROUTER, "r", {**LoadReport(cores=0.9).flatten("")})
    controller.step()
    assert controller.step() == {POOL: 3, ROUTER: 2}


def test_the_settings_are_valid_json() -> None:
    for deployment in build_app(app_module.build(ARGS), name="tandem").deployments:
        policy = deployment._deployment_config.autoscaling_config.policy
        json.dumps(policy.policy_kwargs, allow_nan=False)


def test_the_policy_imports_no_model_library() -> None:
    pickled = AutoscalingPolicy(**AUTOSCALING_POLICY).get_serialized_policy_def()
    assert pickled is not None
    assert isinstance(cloudpickle.loads(pickled), type)
    code = (
        "import sys; from ray import cloudpickle; cloudpickle.loads(sys.stdin.buffer.read())();"
        "print([n for n in ('torch', 'transformers', 'vllm') if n in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], input=pickled, capture_output=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == b"[]"


def test_an_unchanged_report_stays_stale() -> None:
    clock = autoscaling.ReportClock()
    report = SimpleNamespace(timestamp=5.0, value=3.0)
    context: Any = SimpleNamespace(raw_metrics={"ongoing": {"r1": [report]}})  # Serve keeps it
    assert clock.fresh_reports(0.0, context) == [(0.0, {"ongoing": 3.0})]
    for now in (
        autoscaling.STALE_S + 1,
        9 * autoscaling.STALE_S,
        11 * autoscaling.STALE_S,
        12 * autoscaling.STALE_S,
        30 * autoscaling.STALE_S,
    ):
        assert clock.fresh_reports(now, context) == []
