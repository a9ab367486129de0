"""The dashboard's REST interface to Ray Serve, and its answers as values.

Ends and watches the applications of a cluster without importing Ray. Owns one HTTP
client.
"""

import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import httpx

APPLICATIONS = "/api/serve/applications/"
POLL_S = 0.1
REQUEST_TIMEOUT_S = 30.0
"""The first question takes seconds: the dashboard imports Serve for it."""


@dataclass(frozen=True, slots=True)
class ReplicaStatus:
    """One replica of a deployment."""

    id: str
    state: str
    pid: int | None
    node_ip: str | None
    started_at: float | None
    """Unix time."""


@dataclass(frozen=True, slots=True)
class DeploymentStatus:
    """One deployment."""

    name: str
    status: str
    message: str
    target: int
    replicas: tuple[ReplicaStatus, ...]

    @property
    def running(self) -> int:
        """Replicas that serve."""
        return sum(replica.state == "RUNNING" for replica in self.replicas)

    @property
    def healthy(self) -> bool:
        """Whether as many replicas run as are wanted."""
        return self.status == "HEALTHY"


@dataclass(frozen=True, slots=True)
class ApplicationStatus:
    """One application, as Serve sees it."""

    name: str
    status: str
    message: str
    deployments: tuple[DeploymentStatus, ...]

    @property
    def running(self) -> bool:
        """Whether the application and each of its deployments run as configured."""
        return self.status == "RUNNING" and all(d.healthy for d in self.deployments)

    @property
    def failure(self) -> str | None:
        """Why Serve has given up on the application, in one or two lines; None while it has not."""
        for deployment in self.deployments:
            if deployment.status == "DEPLOY_FAILED":
                return f"{deployment.name}: {reason(deployment.message)}"
        return reason(self.message) if self.status == "DEPLOY_FAILED" else None


class ServeApi:
    """A client of one cluster's dashboard.

    Args:
        url: The dashboard's address.
        token: Ray's own token, where ``RAY_AUTH_MODE=token``.
    """

    def __init__(self, url: str, token: str | None = None) -> None:
        headers = {"authorization": f"Bearer {token}"} if token else {}
        # trust_env: a proxy of the environment is not for our own loopback address.
        self._http = httpx.Client(
            base_url=url, headers=headers, timeout=REQUEST_TIMEOUT_S, trust_env=False
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._http.close()

    def drain(self, timeout_s: float) -> bool:
        """End every application once its requests are done; whether it was done in time.

        Deletes the applications and leaves Serve: its own shutdown ends HAProxy at once, and with
        it every answer that is still on its way.
        """
        deadline = time.monotonic() + timeout_s
        try:
            self._http.put(APPLICATIONS, json={"applications": []}, timeout=timeout_s)
            while self._http.get(APPLICATIONS, timeout=timeout_s).json()["applications"]:
                if time.monotonic() > deadline:
                    return False
                time.sleep(POLL_S)
        except (httpx.TransportError, ValueError, KeyError):  # it dies, or is no dashboard
            return False
        return True

    def application(self, name: str) -> ApplicationStatus | None:
        """The application's status; None where it, or the dashboard, is not there (yet)."""
        try:
            response = self._http.get(APPLICATIONS)
        except httpx.TransportError:
            return None
        if not response.is_success:
            return None
        found = response.json().get("applications", {}).get(name)
        return None if found is None else parse_application(found)


def parse_application(raw: Mapping[str, Any]) -> ApplicationStatus:
    """An application's status as Serve's instance details hold it."""
    deployments = sorted(raw.get("deployments", {}).items(), key=lambda item: item[0] != "router")
    return ApplicationStatus(
        name=raw["name"],
        status=raw["status"],
        message=raw.get("message") or "",
        deployments=tuple(_deployment(name, found) for name, found in deployments),
    )


def _deployment(name: str, raw: Mapping[str, Any]) -> DeploymentStatus:
    return DeploymentStatus(
        name=name,
        status=raw["status"],
        message=raw.get("message") or "",
        target=raw.get("target_num_replicas") or 0,
        replicas=tuple(
            ReplicaStatus(
                id=replica["replica_id"],
                state=replica["state"],
                pid=replica.get("pid"),
                node_ip=replica.get("node_ip"),
                started_at=replica.get("start_time_s"),
            )
            for replica in raw.get("replicas", [])
        ),
    )


_COLOUR = re.compile(r"\x1b\[[0-9;]*m")
_RAISED = re.compile(r"^(?:\w+\.)*\w*(?:Error|Exception|Exit|Interrupt)\b.*")


def reason(message: str, limit: int = 400) -> str:
    """What went wrong, out of a message of Serve that holds a traceback or several."""
    lines = [line.rstrip() for line in _COLOUR.sub("", message).splitlines() if line.strip()]
    raised = [index for index, line in enumerate(lines) if _RAISED.match(line)]
    if raised:  # the last exception, and what it says in further lines
        lines = lines[raised[-1] : raised[-1] + 3]
    text = " ".join(line.strip() for line in lines) or "Serve gave no reason"
    return text if len(text) <= limit else f"{text[: limit - 1]}…"
