"""Child process that starts Ray and Serve (``python -m cluster.launch.starter FD``).

It reads a JSON ``StarterInput`` from stdin and writes progress reports as JSON lines to the file
descriptor. It replaces ``ray start --head`` and ``serve deploy`` but does more in parallel: workers
start while the dashboard starts, Serve is imported meanwhile, and replicas start along with the
proxies. This needs private names of Ray, which is pinned to one version.
"""

import json
import os
import sys
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any, TextIO, TypedDict

POLL_S = 0.15
HOUSEKEEPING_NICE = 10
"""Niceness of the dashboard, the autoscaler's monitor and the log monitor."""


class StarterInput(TypedDict):
    """Description of the cluster to start."""

    ray: dict[str, Any]
    """Fields of Ray's ``RayParams``."""
    ray_address: str
    """Address to which ``ray.init()`` of other jobs connects."""
    serve: dict[str, Any]
    """Serve config."""
    application: str
    """Application whose status is reported."""


class BackgroundCall:
    """Call in a separate thread.

    Args:
        call: Function to call.
        nice: Increment of the niceness of the thread and of the processes it starts.
    """

    def __init__(self, call: Callable[[], object], *, nice: int = 0) -> None:
        self._call = call
        self._nice = nice
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            if self._nice:  # on Linux this affects the thread only
                os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), self._nice)
            self._call()
        except Exception as error:
            self._error = error

    def join(self) -> None:
        """Wait for the call and re-raise its exception."""
        self._thread.join()
        if self._error is not None:
            raise self._error


def main(request: StarterInput, reports: TextIO) -> None:
    """Start the cluster and report the application's status until it runs."""

    def report(**fields: Any) -> None:
        print(json.dumps(fields, default=str), file=reports, flush=True)

    serve = BackgroundCall(_import_serve)  # in parallel with the start of Ray
    report(phase="Ray")
    dashboard = _start_ray(request)
    report(phase="Serve")
    serve.join()
    controller = _deploy(request["serve"])
    report(phase="application")
    while not _report_status(controller, request["application"], report):
        time.sleep(POLL_S)
    report(phase="dashboard")
    dashboard.join()
    report(phase="done")


def _import_serve() -> None:
    import ray.serve.schema  # noqa: F401

    from cluster.ray_internals import create_controller  # noqa: F401


def _start_ray(request: StarterInput) -> BackgroundCall:
    """Start a head node that outlives this process; return the start of the dashboard."""
    import ray

    from cluster.ray_internals import Node, RayParams, write_ray_address

    class HeadNode(Node):  # type: ignore[misc]  # Ray is not typed
        def start_api_server(self, **options: Any) -> None:
            start = super().start_api_server
            self.dashboard = BackgroundCall(lambda: start(**options), nice=HOUSEKEEPING_NICE)

        def start_monitor(self) -> None:
            BackgroundCall(super().start_monitor, nice=HOUSEKEEPING_NICE).join()

        def start_log_monitor(self) -> None:
            BackgroundCall(super().start_log_monitor, nice=HOUSEKEEPING_NICE).join()

    params = RayParams(**request["ray"])
    node = HeadNode(params, head=True, shutdown_at_exit=False, spawn_reaper=False)
    write_ray_address(request["ray_address"])
    ray.init(address=node.address, namespace="serve", log_to_driver=False, logging_level="ERROR")
    dashboard: BackgroundCall = node.dashboard
    return dashboard


def _deploy(config: Mapping[str, Any]) -> Any:
    """Start Serve's controller, apply ``config``, and return the controller's handle."""
    import ray
    from ray.serve.schema import ServeDeploySchema

    from cluster.ray_internals import coerce_controller_options, create_controller

    schema = ServeDeploySchema.model_validate(config)
    controller, _ = create_controller(
        http_options=schema.http_options.model_dump(),
        grpc_options=schema.grpc_options.model_dump(),
        global_logging_config=schema.logging_config,
        global_tracing_config=None,
        controller_options=coerce_controller_options(schema.controller_options),
        proxy_location=schema.proxy_location,
    )
    ray.get(controller.apply_config.remote(schema))
    return controller


def _report_status(controller: Any, application: str, report: Callable[..., None]) -> bool:
    """Report the application's status and return True once it runs."""
    import ray

    details = ray.get(controller.get_serve_instance_details.remote())
    status = details.get("applications", {}).get(application)
    report(application=status)
    return status is not None and status["status"] == "RUNNING"


if __name__ == "__main__":
    os.set_inheritable(int(sys.argv[1]), False)  # child processes must not hold it open
    with os.fdopen(int(sys.argv[1]), "w") as channel:
        try:
            main(json.load(sys.stdin), channel)
        except Exception as error:
            print(json.dumps({"error": f"{type(error).__name__}: {error}"}), file=channel)
            raise
