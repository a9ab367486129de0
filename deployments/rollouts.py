"""The decider of all rollouts: one replica, which Ray Serve deploys while there is a rollout.

Everything that it knows is in the GCS (``rollout_store``) and in Serve's controller, so its
successor goes on after a failure. At the end it removes the section ``rollout``, and so itself.
"""

import asyncio
import json
import logging
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from msgspec.structs import replace
from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle

from cluster.client.transport import HandleAnswer
from cluster.config import ClassifierConfig, GeneratorConfig, TandemConfig
from cluster.errors import RolloutError, TandemError
from cluster.launch.serve_api import ApplicationStatus, parse_application, reason
from cluster.link import RequestHead
from cluster.metrics import Registry, table
from cluster.ray_internals import free_resources
from cluster.rollout import UNLABELED, Observation, RolloutDecision, RolloutState, decide
from cluster.serve_internals import confine_replica_to_loopback, read_serve_config
from deployments import rollout_store as store
from deployments.logs import log_with_serve
from deployments.metrics import RayExporter
from deployments.rollout_config import finish_rollout

logger = logging.getLogger("ray.serve.tandem")

INTERVAL_S = 2.0
"""Seconds between two decisions; routers follow the state every second."""
MAX_FAILED_CHECKS = 3
"""Failed readiness checks of one replica after which the rollout is rolled back."""
MAX_UNHEALTHY = 10
"""Decisions in a row at which Serve may report the new version as failed."""
CHECK_TIMEOUT_S = 120.0
CHECKSUM_TIMEOUT_S = 3600.0

PROMPTS: Mapping[str, tuple[str, dict[str, Any]]] = {
    "classify": ("/classify", {"input": "I loved it."}),
    "embed": ("/v1/embeddings", {"input": "I loved it."}),
    "embed-sparse": ("/embed_sparse", {"inputs": "I loved it."}),
    "token-classification": ("/ner", {"input": "Anna lives in Berlin."}),
    "score": ("/score", {"text_1": "Who?", "text_2": "Anna."}),
    "rerank": ("/rerank", {"query": "Who?", "documents": ["Anna.", "Berlin."]}),
}
"""Path and body of the fixed request of each task of classifiers."""
LABELED = frozenset({"classify", "token-classification"})
"""Tasks whose answers have labels, which are compared."""
COMPLETION = {"prompt": "The capital of France is", "max_tokens": 8, "temperature": 0}
"""Body of the fixed request of generators."""


@dataclass(slots=True)
class _Rollout:
    """One rollout in this process."""

    pool: GeneratorConfig | ClassifierConfig
    handle: DeploymentHandle
    """Handle of the new version's deployment."""
    checked: set[str] = field(default_factory=set)
    """Replicas that passed the readiness check."""
    checks: dict[str, asyncio.Task[None]] = field(default_factory=dict)
    """Readiness checks in progress, by replica; a checksum of large files takes minutes."""
    failed_checks: dict[str, int] = field(default_factory=dict)
    num_unhealthy: int = 0
    failure: str = ""
    checksum: str = ""
    """Checksum of the replicas that passed."""


class Rollouts:
    """Replica that decides."""

    async def __init__(  # type: ignore[misc]  # Serve awaits it
        self, config: TandemConfig, pools: Mapping[str, DeploymentHandle]
    ) -> None:
        confine_replica_to_loopback()
        log_with_serve()
        self._app: str = serve.get_replica_context().app_name
        self._config = config
        self.rollouts = [
            _Rollout(pool, pools[pool.candidate_name])
            for pool in config.pools
            if pool.rollout is not None
        ]
        self._registry = Registry()
        self._exporter = RayExporter(self._registry)
        self.start_loop()

    def start_loop(self) -> None:
        """Decide from now on."""
        self._task = asyncio.create_task(self._run())

    def check_health(self) -> None:
        """Raise if nothing is decided any more; Serve then replaces this replica."""
        if self._task.done():
            raise RuntimeError("the decider of the rollouts has ended")

    async def __del__(self) -> None:
        """Stop deciding; Serve awaits this."""
        if hasattr(self, "_task"):
            tasks = [self._task, *(c for r in self.rollouts for c in r.checks.values())]
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)
            await self._exporter.close()

    async def _run(self) -> None:
        while True:
            await self.advance()
            await asyncio.sleep(INTERVAL_S)

    async def advance(self) -> None:
        """Decide once about each rollout."""
        for rollout in self.rollouts:
            try:
                await self._advance(rollout)
            except Exception:  # above all errors of Ray while its head restarts
                logger.exception("rollout of %s: no decision; retrying", rollout.pool.name)

    async def _advance(self, rollout: _Rollout) -> None:
        pool, rule = rollout.pool, rollout.pool.rollout
        assert rule is not None
        state = await asyncio.to_thread(store.read_state, self._app, pool.name)
        _, details = await read_serve_config()
        application = parse_application(details["applications"][self._app])
        if state is None or not state.is_of(rule):
            state = await asyncio.to_thread(self._begin, rollout, application)
            self._record(rollout, (), state)
        elif state.is_finished:
            await self._finish(rollout, application, state)
            return
        ready = self._check_replicas(rollout, application, state)
        state = replace(state, checksum=state.checksum or rollout.checksum)
        seen = await asyncio.to_thread(self._observe, rollout, ready)
        after = decide(state, _kind(pool), rule, seen)
        await asyncio.to_thread(store.write_state, self._app, pool.name, after)
        if seen.action is not None:  # not before: this process may have died since
            about = self._app, pool.name, rule.version
            await asyncio.to_thread(store.delete_action, *about, seen.action)
        self._record(rollout, state.decisions, after)

    def _begin(self, rollout: _Rollout, application: ApplicationStatus) -> RolloutState:
        pool, rule = rollout.pool, rollout.pool.rollout
        assert rule is not None
        targets = {d.name: d.target for d in application.deployments}
        store.delete_totals(self._app, pool.name)
        for action in store.ACTIONS:  # of an earlier rollout with this version
            store.delete_action(self._app, pool.name, rule.version, action)
        state = RolloutState(
            version=rule.version,
            model=rule.model,
            replicas=targets.get(pool.deployment, 0),
            room=min(_count_room(pool, free_resources()), self._budget_room(targets, pool)),
            since=time.time(),
            checksum=rule.checksum or "",
        )
        text = f"{state.replicas} replicas of {pool.model}; room for {state.room} of {rule.model}"
        return state.note(state.since, "started", text)

    async def _finish(
        self, rollout: _Rollout, application: ApplicationStatus, state: RolloutState
    ) -> None:
        """Change the configuration, which ends this replica."""
        pool, rule = rollout.pool, rollout.pool.rollout
        assert rule is not None
        old = next((d for d in application.deployments if d.name == pool.deployment), None)
        # Routers without a rollout wait less for the first replica of a version that gave way.
        if state.phase == "rolled_back" and old is not None and old.target and not old.running:
            return
        await finish_rollout(self._app, pool.name, rule, promoted=state.phase == "promoted")
        await asyncio.to_thread(store.delete_totals, self._app, pool.name)

    def _budget_room(
        self, targets: Mapping[str, int], pool: GeneratorConfig | ClassifierConfig
    ) -> int:
        """Return the replicas of a pool that the budget still allows."""
        room = math.inf
        for kind in ("cpus", "gpus"):
            limit = getattr(self._config.budget, kind)
            each = getattr(pool.resources, kind) * pool.num_workers
            if limit is None or not each:
                continue
            used = targets.get("router", 0) * getattr(self._config.router.resources, kind)
            for part in self._config.pools:
                num = targets.get(part.deployment, 0)
                used += num * part.num_workers * getattr(part.resources, kind)
            room = min(room, (limit - used) / each + 1e-9)
        return max(0, int(min(room, pool.replicas.max)))

    # -- readiness --

    def _check_replicas(
        self, rollout: _Rollout, application: ApplicationStatus, state: RolloutState
    ) -> int:
        """Start the checks of new replicas; return the number of those that passed."""
        candidate = rollout.pool.candidate
        assert candidate is not None
        name = candidate.deployment
        found = next((d for d in application.deployments if d.name == name), None)
        if found is None:
            return 0
        failed = found.status in ("UNHEALTHY", "DEPLOY_FAILED")
        rollout.num_unhealthy = rollout.num_unhealthy + 1 if failed else 0
        if rollout.num_unhealthy >= MAX_UNHEALTHY:
            rollout.failure = f"the new version does not run: {reason(found.message)}"
        running = [replica.id for replica in found.replicas if replica.state == "RUNNING"]
        for id_ in running:
            if id_ not in rollout.checked and id_ not in rollout.checks:
                check = asyncio.create_task(self._check_replica(rollout, id_, state.checksum))
                rollout.checks[id_] = check
                check.add_done_callback(partial(_forget_check, rollout, id_))
        return len(rollout.checked.intersection(running))

    async def _check_replica(self, rollout: _Rollout, id_: str, expected: str) -> None:
        try:
            await self._answer_prompt(rollout, id_)
            checksum = await self._checksum(rollout, id_)
            expected = expected or rollout.checksum or checksum
            if checksum != expected:
                raise RolloutError(f"weight checksum is {checksum}, expected {expected}")
        except (TandemError, RayError, RayServeException, TimeoutError) as error:
            num = rollout.failed_checks[id_] = rollout.failed_checks.get(id_, 0) + 1
            text = str(error) or type(error).__name__
            logger.warning("rollout of %s: check of %s: %s", rollout.pool.name, id_, text)
            if num >= MAX_FAILED_CHECKS:
                rollout.failure = f"readiness check of {id_}: {text}"
        else:
            rollout.checked.add(id_)
            rollout.checksum = expected

    async def _answer_prompt(self, rollout: _Rollout, id_: str) -> None:
        request = _fixed_request(rollout.pool)
        if request is None:
            return
        path, body = request
        head = RequestHead(
            method="POST", path=path, headers=[(b"content-type", b"application/json")]
        )
        content = json.dumps({"model": rollout.pool.name, **body}).encode()
        streaming = rollout.handle.options(stream=True)
        answer = HandleAnswer(streaming.answer_call.remote(id_, head, content))
        received = b""
        async with asyncio.timeout(CHECK_TIMEOUT_S):
            status = (await answer.head()).status
            while chunk := await answer.read():
                received += chunk
        if status != 200:
            raise RolloutError(f"{path} answered with status {status}: {received[:200]!r}")

    async def _checksum(self, rollout: _Rollout, id_: str) -> str:
        async with asyncio.timeout(CHECKSUM_TIMEOUT_S):
            checksum: str = await rollout.handle.weights_checksum.remote(id_)
        return checksum

    # -- decisions --

    def _observe(self, rollout: _Rollout, ready: int) -> Observation:
        pool, rule = rollout.pool, rollout.pool.rollout
        assert rule is not None
        return Observation(
            now=time.time(),
            totals=store.read_totals(self._app, pool.name, rule.version),
            ready=ready,
            failure=rollout.failure,
            action=store.read_action(self._app, pool.name, rule.version),
        )

    def _record(
        self, rollout: _Rollout, before: tuple[RolloutDecision, ...], state: RolloutState
    ) -> None:
        """Log and count the new decisions."""
        name = rollout.pool.name
        self._registry.gauge(table.ROLLOUT_SHARE, name).value = state.share / 100
        for decision in state.decisions:
            if decision not in before:
                text = "rollout: %s to %s (%s): %s: %s"
                about = name, state.model, state.version
                logger.info(text, *about, decision.decision, decision.reason)
                self._registry.counter(table.ROLLOUT_DECISIONS, name, decision.decision).add()


def _forget_check(rollout: _Rollout, id_: str, _check: asyncio.Task[None]) -> None:
    rollout.checks.pop(id_, None)


def _kind(pool: GeneratorConfig | ClassifierConfig) -> str:
    """Return the kind of a pool for ``judge``."""
    is_unlabeled = isinstance(pool, ClassifierConfig) and LABELED.isdisjoint(pool.tasks)
    return UNLABELED if is_unlabeled else pool.kind


def _fixed_request(
    pool: GeneratorConfig | ClassifierConfig,
) -> tuple[str, dict[str, Any]] | None:
    if isinstance(pool, GeneratorConfig):
        return "/v1/completions", COMPLETION
    return next((PROMPTS[task] for task in pool.tasks if task in PROMPTS), None)


def _count_room(pool: GeneratorConfig | ClassifierConfig, nodes: list[dict[str, float]]) -> int:
    """Return the replicas of a pool that fit into what the nodes have not reserved."""
    wanted = pool.resources
    each = {"CPU": wanted.cpus, "GPU": wanted.gpus, **wanted.custom}
    each = {name: amount for name, amount in each.items() if amount}
    if not each:
        return pool.replicas.max
    fitting = [
        int(min(node.get(name, 0.0) / amount for name, amount in each.items()) + 1e-9)
        for node in nodes
    ]
    if isinstance(pool, GeneratorConfig) and not pool.needs_one_node:
        return sum(fitting) // pool.num_workers
    return sum(workers // pool.num_workers for workers in fitting)
