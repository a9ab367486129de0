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
from concurrent.futures import Future
from pathlib import Path
from typing import Any, TextIO, TypedDict

POLL_S = 0.15
HEAD_KEY = b"head"
"""Key of ``HeadInfo`` in the GCS."""
KV_TIMEOUT_S = 30.0
HOUSEKEEPING_NICE = 10
"""Niceness of the dashboard, the autoscaler's monitor and the log monitor."""


class HeadInfo(TypedDict):
    """Properties of a cluster that nodes need to join; stored in its GCS."""

    tandem: str
    """Version of Tandem."""
    application: str
    http_port: int
    http_scheme: str
    haproxy: bool
    dashboard_url: str
    object_store_memory_bytes: int
    head_timeout_s: int | None
    """Time for which nodes wait for the head, in seconds; None: as long as Ray does by default."""
    serve: dict[str, Any]
    """Serve config with which the cluster was started."""


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
    head: HeadInfo | None
    """Description for nodes that join; None if none can."""
    key_file: str | None
    """Key file to copy to the cluster."""


def call_in_thread(call: Callable[[], object], *, nice: int = 0) -> Future[object]:
    """Call in a new thread; it and the processes it starts get the niceness ``nice``."""
    future: Future[object] = Future()

    def run() -> None:
        try:
            if nice:  # on Linux this affects the thread only
                os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), nice)
            future.set_result(call())
        except Exception as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future


def main(request: StarterInput, reports: TextIO) -> None:
    def report(**fields: Any) -> None:
        print(json.dumps(fields, default=str), file=reports, flush=True)

    serve = call_in_thread(_import_serve)  # in parallel with the start of Ray
    report(phase="Ray")
    dashboard = _start_ray(request)
    _publish_head(request)
    _publish_keys(request)
    report(phase="Serve")
    serve.result()
    controller = _deploy(request["serve"])
    import ray

    report(phase="application")
    details = controller.get_serve_instance_details
    wait_until_running(lambda: ray.get(details.remote()), request["application"], report)
    report(phase="dashboard")
    dashboard.result()
    _publish_keys(request)  # changes of the file since the start
    report(phase="done")


def _import_serve() -> None:
    import ray.serve.schema  # noqa: F401

    from cluster.serve_internals import create_controller  # noqa: F401


def _start_ray(request: StarterInput) -> Future[object]:
    """Start a head node that outlives this process; return the start of the dashboard."""
    import ray

    from cluster.ray_internals import Node, RayParams, limit_helpers, write_ray_address

    limit_helpers()

    class HeadNode(Node):  # type: ignore[misc]  # Ray is not typed
        def start_api_server(self, **options: Any) -> None:
            start = super().start_api_server
            self.dashboard = call_in_thread(lambda: start(**options), nice=HOUSEKEEPING_NICE)

    params = RayParams(**request["ray"])
    node = HeadNode(params, head=True, shutdown_at_exit=False, spawn_reaper=False)
    write_ray_address(request["ray_address"])
    ray.init(address=node.address, namespace="serve", log_to_driver=False, logging_level="ERROR")
    dashboard: Future[object] = node.dashboard
    return dashboard


def _publish_head(request: StarterInput) -> None:
    """Store what other nodes need to join.

    The version of a state in Redis is known only here, after Ray has loaded the state and may have
    restarted some of its actors.

    Raises:
        ValueError: Redis has the state of a cluster of another version.
    """
    from cluster.ray_internals import kv_get, kv_put

    if request["head"] is not None:
        if stored := kv_get(HEAD_KEY):
            check_version(json.loads(stored)["tandem"], request["head"]["tandem"])
        kv_put(HEAD_KEY, json.dumps(request["head"]).encode(), KV_TIMEOUT_S)


def check_version(stored: str, own: str) -> None:
    """Raise ValueError if a head of another version left its state in Redis."""
    if stored != own:
        raise ValueError(
            f"Redis has the state of a cluster of Tandem {stored}, this is {own}. Start that "
            "version, or delete the state with `tandem down`."
        )


def _publish_keys(request: StarterInput) -> None:
    """Copy the key file to the cluster if there is one."""
    from cluster.key_file import copy_keys
    from cluster.ray_internals import KEYS_KEY, kv_put

    if request["key_file"] is not None:
        copy_keys(Path(request["key_file"]), lambda text: kv_put(KEYS_KEY, text, KV_TIMEOUT_S))


def _deploy(config: Mapping[str, Any]) -> Any:
    import ray
    from ray.serve.schema import ServeDeploySchema

    from cluster.serve_internals import (
        SERVE_CONTROLLER_NAME,
        SERVE_NAMESPACE,
        coerce_controller_options,
        create_controller,
    )

    schema = ServeDeploySchema.model_validate(config)
    # The GCS restarts the controller of a cluster whose state is in Redis, with the HTTP and gRPC
    # options and the proxy location with which it was created.
    try:
        controller = ray.get_actor(SERVE_CONTROLLER_NAME, namespace=SERVE_NAMESPACE)
    except ValueError:
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


def wait_until_running(
    read_details: Callable[[], Mapping[str, Any]], application: str, report: Callable[..., None]
) -> None:
    """Report the application's status until it runs; the parent enforces the timeout."""
    while True:
        try:
            status = read_details().get("applications", {}).get(application)
            report(application=status)
            if status is not None and status["status"] == "RUNNING":
                return
        except Exception as error:  # e.g. Serve's controller while it creates a deployment
            report(poll_error=f"{type(error).__name__}: {error}")
        time.sleep(POLL_S)


def run_child(main: Callable[[Any, TextIO], None]) -> None:
    """Run ``main`` on the request in stdin, with the file descriptor in ``sys.argv[1]``."""
    os.set_inheritable(int(sys.argv[1]), False)  # child processes must not hold it open
    with os.fdopen(int(sys.argv[1]), "w") as channel:
        try:
            main(json.load(sys.stdin), channel)
        except Exception as error:
            print(json.dumps({"error": f"{type(error).__name__}: {error}"}), file=channel)
            raise


if __name__ == "__main__":
    run_child(main)
