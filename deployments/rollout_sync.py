"""A router's part in rollouts: it follows the decider, reports totals, and passes on actions."""

import asyncio
import logging
import time
from collections.abc import Mapping
from typing import Any

from ray.exceptions import RayError

from cluster.errors import InvalidRequestError, NotFoundError
from cluster.gateway import Rollout
from cluster.rollout import Action, RolloutState
from deployments import rollout_store as store
from deployments.rollout_config import deployed_rollouts, start_rollout

logger = logging.getLogger("ray.serve.tandem")

INTERVAL_S = 1.0
"""Seconds between exchanges with the decider."""


class RolloutSync:
    """Task that exchanges states and totals while there are rollouts.

    Args:
        app: Name of the application.
        router: Id of this router.
        rollouts: Its rollouts, by the name of their pool.
    """

    def __init__(self, app: str, router: str, rollouts: Mapping[str, Rollout]) -> None:
        self._app = app
        self._router = router
        self._rollouts = rollouts
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Learn the shares, and follow them from now on."""
        if self._rollouts:
            await self._exchange()
            self._task = asyncio.create_task(self._run())

    async def close(self) -> None:
        """Report the last totals and stop."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])
            await self._exchange()

    async def _run(self) -> None:
        while True:
            await asyncio.sleep(INTERVAL_S)
            await self._exchange()

    async def _exchange(self) -> None:
        for name, rollout in self._rollouts.items():
            totals = rollout.totals()
            try:
                state = await asyncio.to_thread(store.read_state, self._app, name)
                rollout.update(state)
                # The decider deletes the totals of a finished rollout.
                if state is None or not state.is_finished:
                    about = self._app, name, rollout.version, self._router
                    await asyncio.to_thread(store.write_totals, *about, totals)
            except (RayError, RuntimeError) as error:  # the last share stays
                logger.warning("rollout of %s: no exchange with the GCS: %s", name, error)


class RolloutAccess:
    """Implementation of the gateway's ``RolloutControl``."""

    def __init__(self, app: str, pools: list[str]) -> None:
        self._app = app
        self._pools = pools

    async def states(self) -> dict[str, RolloutState]:
        """Return the last rollout of each pool that had one.

        It is cancelled if the deployed configuration no longer has it, since nothing decides then.
        """
        states = await asyncio.to_thread(store.read_states, self._app, self._pools)
        if all(state.is_finished for state in states.values()):
            return states
        deployed = await deployed_rollouts(self._app)
        return {
            pool: state
            if state.is_finished or (pool in deployed and state.is_of(deployed[pool]))
            else state.cancel()
            for pool, state in states.items()
        }

    async def start(self, model: str, settings: dict[str, Any]) -> str:
        """Start a rollout and return its version, by default the time."""
        last = (await self.states()).get(model)
        if last is not None and settings.get("version") == last.version:
            raise InvalidRequestError(
                f"The version `{last.version}` was used by the last rollout of `{model}`. "
                "Choose another one, or omit it."
            )
        version = settings.get("version") or time.strftime("%y%m%d-%H%M%S", time.gmtime())
        await start_rollout(self._app, model, {**settings, "version": version})
        return str(version)

    async def act(self, model: str, action: Action) -> None:
        """Store the action for the decider."""
        state = (await self.states()).get(model)
        if state is None or state.is_finished:
            raise NotFoundError(f"No rollout of `{model}` is in progress.")
        about = self._app, model, state.version
        await asyncio.to_thread(store.write_action, *about, action)
