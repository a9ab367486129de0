"""Client of the Ray dashboard's REST API for Ray Serve, without importing Ray."""

import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import httpx

from cluster.errors import StartError

APPLICATIONS = "/api/serve/applications/"
_SERVE_SETTINGS = ("proxy_location", "http_options", "grpc_options")
POLL_S = 0.1
# On the first request the dashboard imports Serve, which takes seconds.
REQUEST_TIMEOUT_S = 30.0


@dataclass(frozen=True, slots=True)
class ReplicaStatus:
    """Replica of a deployment."""

    id: str
    state: str
    pid: int | None
    node_ip: str | None
    started_at: float | None
    """Unix time."""


@dataclass(frozen=True, slots=True)
class DeploymentStatus:
    """Deployment and its replicas."""

    name: str
    status: str
    message: str
    target: int
    """Number of replicas that Serve aims at."""
    replicas: tuple[ReplicaStatus, ...]

    @property
    def running(self) -> int:
        return sum(replica.state == "RUNNING" for replica in self.replicas)

    @property
    def healthy(self) -> bool:
        return self.status == "HEALTHY"


@dataclass(frozen=True, slots=True)
class ApplicationStatus:
    """Application and its deployments."""

    name: str
    status: str
    message: str
    deployments: tuple[DeploymentStatus, ...]

    @property
    def running(self) -> bool:
        return self.status == "RUNNING" and all(d.healthy for d in self.deployments)

    @property
    def failure(self) -> str | None:
        """Reason for which Serve has given up on the application; None while it has not."""
        for deployment in self.deployments:
            if deployment.status == "DEPLOY_FAILED":
                return f"{deployment.name}: {reason(deployment.message)}"
        return reason(self.message) if self.status == "DEPLOY_FAILED" else None


@dataclass(frozen=True, slots=True)
class TandemDetails:
    """Tandem's application in a cluster, and where Serve listens."""

    application: str
    http_host: str | None
    http_port: int | None
    deployed_at: float
    """Unix time."""


class ServeApi:
    """Client of one cluster's dashboard; ``token`` is required with ``RAY_AUTH_MODE=token``."""

    def __init__(self, url: str, token: str | None = None) -> None:
        headers = {"authorization": f"Bearer {token}"} if token else {}
        # The dashboard listens on loopback: ignore a proxy set in the environment.
        self._http = httpx.Client(
            base_url=url, headers=headers, timeout=REQUEST_TIMEOUT_S, trust_env=False
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._http.close()

    def drain(self, timeout_s: float) -> bool:
        """Delete every application after its requests; return False on timeout or failure.

        Serve itself keeps running: its shutdown would end HAProxy, and with it open responses.
        """
        deadline = time.monotonic() + timeout_s
        try:
            self._http.put(APPLICATIONS, json={"applications": []}, timeout=timeout_s)
            while self._http.get(APPLICATIONS, timeout=timeout_s).json()["applications"]:
                if time.monotonic() > deadline:
                    return False
                time.sleep(POLL_S)
        except (httpx.TransportError, ValueError, KeyError):  # it died, or is not a dashboard
            return False
        return True

    def find(self, import_path: str) -> TandemDetails | None:
        """Return the application with this import path; None without one or without an answer."""
        try:
            response = self._http.get(APPLICATIONS)
            details = response.json() if response.is_success else {}
        except (httpx.TransportError, ValueError):
            return None
        http = details.get("http_options") or {}
        for name, application in details.get("applications", {}).items():
            if (application.get("deployed_app_config") or {}).get("import_path") == import_path:
                deployed_at = application.get("last_deployed_time_s") or 0.0
                return TandemDetails(name, http.get("host"), http.get("port"), deployed_at)
        return None

    def deployed_args(self, name: str) -> dict[str, Any]:
        """Return the ``args`` with which an application was deployed.

        Raises:
            StartError: the dashboard does not answer, or there is no such application.
        """
        args: dict[str, Any] = _find(self.deployed_config()["applications"], name).get("args") or {}
        return args

    def deploy_args(self, name: str, args: Mapping[str, Any]) -> None:
        """Deploy an application with other ``args``; everything else stays as it was deployed.

        Raises:
            StartError: the dashboard does not answer, or there is no such application.
        """
        config = self.deployed_config()
        _find(config["applications"], name)["args"] = args
        try:
            self._http.put(APPLICATIONS, json=config).raise_for_status()
        except httpx.HTTPError as error:
            raise StartError(f"Ray Serve does not accept the configuration: {error}") from None

    def deployed_config(self) -> dict[str, Any]:
        """Return the Serve config that is deployed.

        Raises:
            StartError: the dashboard does not answer.
        """
        try:
            response = self._http.get(APPLICATIONS)
            response.raise_for_status()
            details = response.json()
            applications = [
                each["deployed_app_config"] for each in details["applications"].values()
            ]
        except (httpx.HTTPError, ValueError, KeyError) as error:
            raise StartError(f"Ray's dashboard does not answer: {error}") from None
        settings = {each: details[each] for each in _SERVE_SETTINGS if details.get(each)}
        return {**settings, "applications": [each for each in applications if each is not None]}

    def application(self, name: str) -> ApplicationStatus | None:
        """Return the application's status; None if it or the dashboard does not exist (yet)."""
        try:
            response = self._http.get(APPLICATIONS)
        except httpx.TransportError:
            return None
        if not response.is_success:
            return None
        found = response.json().get("applications", {}).get(name)
        return None if found is None else parse_application(found)


def _find(applications: list[dict[str, Any]], name: str) -> dict[str, Any]:
    found = next((each for each in applications if each.get("name") == name), None)
    if found is None:
        raise StartError(f"The cluster has no application {name!r}.")
    return found


def parse_application(raw: Mapping[str, Any]) -> ApplicationStatus:
    deployments = sorted(raw.get("deployments", {}).items(), key=lambda item: item[0] != "router")
    return ApplicationStatus(
        name=raw["name"],
        status=raw["status"],
        message=raw.get("message") or "",
        deployments=tuple(
            DeploymentStatus(
                name=name,
                status=found["status"],
                message=found.get("message") or "",
                target=found.get("target_num_replicas") or 0,
                replicas=tuple(map(_replica, found.get("replicas", []))),
            )
            for name, found in deployments
        ),
    )


def _replica(raw: Mapping[str, Any]) -> ReplicaStatus:
    optional = raw.get("pid"), raw.get("node_ip"), raw.get("start_time_s")
    return ReplicaStatus(raw["replica_id"], raw["state"], *optional)


_ANSI_COLOR = re.compile(r"\x1b\[[0-9;]*m")
_EXCEPTION_LINE = re.compile(r"^(?:\w+\.)*\w*(?:Error|Exception|Exit|Interrupt)\b.*")


def reason(message: str, limit: int = 400) -> str:
    """Extract the cause from a message of Serve, which may contain several tracebacks."""
    lines = [line.rstrip() for line in _ANSI_COLOR.sub("", message).splitlines() if line.strip()]
    raised = [index for index, line in enumerate(lines) if _EXCEPTION_LINE.match(line)]
    if raised:  # the last exception, with at most two more lines of its message
        lines = lines[raised[-1] : raised[-1] + 3]
    text = " ".join(line.strip() for line in lines) or "Serve gave no reason"
    return text if len(text) <= limit else f"{text[: limit - 1]}…"
