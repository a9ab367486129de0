"""A cluster that runs Tandem but was started by others: with ``ray start``, KubeRay, `ray up`."""

import os
from collections.abc import Mapping

import psutil

from cluster.config.file import ALL_ADDRESSES, DEFAULT_HOST, DEFAULT_PORT, IMPORT_PATH
from cluster.launch import processes
from cluster.launch.auth import ray_token
from cluster.launch.ports import url_host
from cluster.launch.serve_api import ServeApi, TandemDetails
from cluster.launch.state import ClusterState, ClusterStatus

GCS_OPTION = "--gcs-address="
TIMEOUT_S = 5.0


def read_other_status() -> ClusterStatus | None:
    """Return the status of the Ray cluster of this machine if it runs Tandem; otherwise None."""
    address = find_gcs_address(os.environ)
    dashboard = address and _dashboard_address(address)
    if not address or not dashboard:
        return None
    with ServeApi(f"http://{dashboard}", ray_token(os.environ)) as api:
        found = api.find(IMPORT_PATH)
        application = api.application(found.application) if found else None
    if found is None:
        return None
    known = _state(address, f"http://{dashboard}", found)
    return ClusterStatus(known, True, 0, 0, application)


def find_gcs_address(environment: Mapping[str, str]) -> str | None:
    """Return ``RAY_ADDRESS``, or else the address of this user's raylet that Tandem did not start.

    Ray's token is sent there, so a process of another user must not choose the address.
    """
    if (address := environment.get("RAY_ADDRESS")) and "://" not in address:
        return address
    for process in psutil.process_iter(["name", "cmdline", "uids"]):
        uids = process.info["uids"]
        if process.info["name"] != "raylet" or not uids or uids.real != os.getuid():
            continue
        if processes.environment_of(process.pid):
            continue
        for argument in process.info["cmdline"] or ():
            if argument.startswith(GCS_OPTION):
                return str(argument.removeprefix(GCS_OPTION))
    return None


def _dashboard_address(gcs_address: str) -> str | None:
    from cluster.ray_internals import read_dashboard_address

    try:
        return read_dashboard_address(gcs_address, TIMEOUT_S)
    except Exception:  # Ray's errors, and gRPC's: it has just died, or wants a token
        return None


def _state(gcs_address: str, dashboard_url: str, found: TandemDetails) -> ClusterState:
    host = found.http_host or DEFAULT_HOST
    if host in (ALL_ADDRESSES, "::"):
        host = DEFAULT_HOST
    return ClusterState(
        cluster_id="",
        application=found.application,
        http_url=f"http://{url_host(host)}:{found.http_port or DEFAULT_PORT}",
        dashboard_url=dashboard_url,
        ray_address=gcs_address,
        config_path="",
        started_at=found.deployed_at,
    )
