"""Runs as ``python -m cluster.launch.starter FD``: starts Ray and Serve, deploys, and reports.

The order of a job comes as JSON on stdin, reports go as JSON lines to the file descriptor. Does
what ``ray start --head`` and ``serve deploy`` do, and no more of what those do one after the
other than must be: the raylet and the workers start while the dashboard does, Serve is imported
meanwhile, and replicas start while the proxies do. Uses Ray's private names for it (Ray is pinned
to one version); no other module of Tandem starts anything.
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
"""For the dashboard, the autoscaler's monitor and the log monitor: they yield to what serves."""


class Order(TypedDict):
    """What is to be started."""

    ray: dict[str, Any]
    """Fields of Ray's ``RayParams``."""
    ray_address: str
    """What ``ray.init()`` of other jobs shall connect to."""
    serve: dict[str, Any]
    """A Serve config."""
    application: str
    """The application whose status is reported."""


class Background:
    """A call in a thread of its own, whose exception is not lost.

    Args:
        call: What to do.
        nice: Added to the niceness of the thread, and so of the processes that it starts.
    """

    def __init__(self, call: Callable[[], object], *, nice: int = 0) -> None:
        self._call = call
        self._nice = nice
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            if self._nice:  # on Linux, of this thread alone
                os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), self._nice)
            self._call()
        except Exception as error:
            self._error = error

    def join(self) -> None:
        """Wait for the call; raises what it raised."""
        self._thread.join()
        if self._error is not None:
            raise self._error


def main(order: Order, reports: TextIO) -> None:
    """Start everything, then report the application's status until it runs."""

    def report(**what: Any) -> None:
        print(json.dumps(what, default=str), file=reports, flush=True)

    serve = Background(_import_serve)  # while the rest of Ray starts
    report(phase="Ray")
    dashboard = _start_ray(order)
    report(phase="Serve")
    serve.join()
    controller = _deploy(order["serve"])
    report(phase="application")
    while not _report_status(controller, order["application"], report):
        time.sleep(POLL_S)
    report(phase="dashboard")
    dashboard.join()
    report(phase="done")


def _import_serve() -> None:
    import ray.serve._private.api
    import ray.serve.schema  # noqa: F401


def _start_ray(order: Order) -> Background:
    """Start a head node, whose processes outlive this one; the dashboard is still starting."""
    import ray
    from ray._private.node import Node
    from ray._private.parameter import RayParams
    from ray._private.utils import write_ray_address

    class HeadNode(Node):  # type: ignore[misc]  # Ray is not typed
        def start_api_server(self, **options: Any) -> None:
            start = super().start_api_server
            self.dashboard = Background(lambda: start(**options), nice=HOUSEKEEPING_NICE)

        def start_monitor(self) -> None:
            Background(super().start_monitor, nice=HOUSEKEEPING_NICE).join()

        def start_log_monitor(self) -> None:
            Background(super().start_log_monitor, nice=HOUSEKEEPING_NICE).join()

    params = RayParams(**order["ray"])
    node = HeadNode(params, head=True, shutdown_at_exit=False, spawn_reaper=False)
    write_ray_address(order["ray_address"])
    ray.init(address=node.address, namespace="serve", log_to_driver=False, logging_level="ERROR")
    dashboard: Background = node.dashboard
    return dashboard


def _deploy(config: Mapping[str, Any]) -> Any:
    """Start Serve's controller, make ``config`` its goal, and return its handle."""
    import ray
    from ray.serve._private import api
    from ray.serve.schema import ServeDeploySchema

    wanted = ServeDeploySchema.model_validate(config)
    controller, _ = api._create_controller_and_proxy_refs(
        http_options=wanted.http_options.model_dump(),
        grpc_options=wanted.grpc_options.model_dump(),
        global_logging_config=wanted.logging_config,
        global_tracing_config=None,
        controller_options=api._coerce_controller_options(wanted.controller_options),
        proxy_location=wanted.proxy_location,
    )
    ray.get(controller.apply_config.remote(wanted))
    return controller


def _report_status(controller: Any, application: str, report: Callable[..., None]) -> bool:
    """Report the application's status; whether it runs."""
    import ray

    details = ray.get(controller.get_serve_instance_details.remote())
    status = details.get("applications", {}).get(application)
    report(application=status)
    return status is not None and status["status"] == "RUNNING"


if __name__ == "__main__":
    os.set_inheritable(int(sys.argv[1]), False)  # not for the processes that are started here
    with os.fdopen(int(sys.argv[1]), "w") as channel:
        try:
            main(json.load(sys.stdin), channel)
        except Exception as error:
            print(json.dumps({"error": f"{type(error).__name__}: {error}"}), file=channel)
            raise
