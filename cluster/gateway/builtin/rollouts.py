"""``/v1/rollouts``: the state of rollouts, their start, and actions on them; for operators only."""

from typing import Any, Literal, Protocol

import msgspec

from cluster.errors import InvalidRequestError, UnsupportedError
from cluster.gateway.builtin.own_paths import ROLLOUTS_PATH
from cluster.gateway.messages import (
    Request,
    Response,
    header,
    json_response,
    require_operator,
)
from cluster.rollout import Action, RolloutState


class RolloutControl(Protocol):
    """Access to the rollouts of this application."""

    async def states(self) -> dict[str, RolloutState]:
        """Return the last rollout of each pool that had one, by the pool's name."""

    async def start(self, model: str, settings: dict[str, Any]) -> str:
        """Start a rollout and return its version.

        Raises:
            InvalidRequestError: A setting is invalid, or a rollout of the pool is in progress.
            NotFoundError: There is no such pool.
        """

    async def act(self, model: str, action: Action) -> None:
        """Request an action of the decider, which follows within seconds.

        Raises:
            NotFoundError: No rollout of the pool is in progress.
        """


class RolloutRequest(msgspec.Struct, forbid_unknown_fields=True):
    """Body of a ``POST``."""

    action: Literal["start", "pause", "resume", "abort"]
    settings: dict[str, Any] = {}
    """Fields of the section `rollout`, for a start."""


_decode = msgspec.json.Decoder(RolloutRequest).decode


class RolloutRoutes:
    """Handlers of the paths; without control, there are no rollouts."""

    def __init__(self, control: RolloutControl | None) -> None:
        self._control = control

    async def show(self, request: Request) -> Response:
        """List the rollouts, running or finished."""
        require_operator(request, ROLLOUTS_PATH)
        states = await self._control.states() if self._control is not None else {}
        data = [
            {**msgspec.to_builtins(state), "model": name, "to": state.model}
            for name, state in states.items()
        ]
        return json_response({"object": "list", "data": data})

    async def change(self, request: Request) -> Response:
        """Start a rollout, or pause, resume or abort it."""
        require_operator(request, ROLLOUTS_PATH)
        if self._control is None:
            raise UnsupportedError("Rollouts need Ray Serve.")
        # Browsers send this type to other sites only after asking, and get no permission.
        if not (header(request.headers, b"content-type") or "").startswith("application/json"):
            raise InvalidRequestError("The content type must be application/json.")
        try:
            body = _decode(request.body)
        except msgspec.DecodeError as error:
            raise InvalidRequestError(f"Invalid body: {error}") from None
        model = request.path.removeprefix(f"{ROLLOUTS_PATH}/")
        if body.action == "start":
            version = await self._control.start(model, body.settings)
            return json_response({"model": model, "version": version})
        await self._control.act(model, body.action)
        return json_response({"model": model, "action": body.action})
