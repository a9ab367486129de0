"""Private names of Ray and Ray Serve; no other module uses any. Read from Ray 2.60.0.

Each of them exists because Ray has no public way to do the same, and each may change with the next
release: ``tests/serve/test_ray_internals.py`` names those that the installed Ray lacks.

``from cluster.ray_internals import DeploymentID`` imports the Ray module in which the name is
defined. Nothing is imported before, because importing Serve takes about two seconds.
"""

import asyncio
import importlib
import importlib.util
import inspect
import json
import os
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from string import Template
from typing import Any, NamedTuple

from cluster.errors import RayIncompatibleError
from cluster.haproxy_servers import server_comparison

RAY_VERSION = "2.60.0"
"""Ray release that the names below were read from."""
LOOPBACK_VARIABLE = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"
"""Environment variable of Ray; "0" binds all of Ray's ports to loopback."""


class PrivateName(NamedTuple):
    """A name in Ray and the reason for its use."""

    path: str
    """Module and name, separated by a colon."""
    purpose: str
    parameters: str = ""
    """Parameters in use, separated by spaces."""


_SERVE = "ray.serve._private"
_NODE = "ray._private.node:Node"
_KV = "ray.experimental.internal_kv:"

EXPORTED = {
    "DeploymentID": PrivateName(
        f"{_SERVE}.common:DeploymentID", "key of a deployment in the controller", "name app_name"
    ),
    "DeploymentTargetInfo": PrivateName(
        f"{_SERVE}.common:DeploymentTargetInfo", "update of the running replicas"
    ),
    "RunningReplicaInfo": PrivateName(
        f"{_SERVE}.common:RunningReplicaInfo", "a running replica", "replica_id replica_metadata"
    ),
    "LongPollClient": PrivateName(
        f"{_SERVE}.long_poll:LongPollClient",
        "subscription to the running replicas",
        "host_actor key_listeners call_in_event_loop client_id",
    ),
    "LongPollNamespace": PrivateName(
        f"{_SERVE}.long_poll:LongPollNamespace", "topic of a subscription"
    ),
    "SERVE_CONTROLLER_NAME": PrivateName(
        f"{_SERVE}.constants:SERVE_CONTROLLER_NAME", "actor name of Serve's controller"
    ),
    "SERVE_NAMESPACE": PrivateName(
        f"{_SERVE}.constants:SERVE_NAMESPACE", "Ray namespace of Serve's controller"
    ),
    "HEAD_NODE_RESOURCE_NAME": PrivateName(
        "ray._common.constants:HEAD_NODE_RESOURCE_NAME", "resource of the head alone"
    ),
    "get_serve_logs_dir": PrivateName(
        f"{_SERVE}.logging_utils:get_serve_logs_dir", "directory of the request log"
    ),
    "Node": PrivateName(
        _NODE,
        "node of a cluster; a head's dashboard starts in the background",
        "ray_params head shutdown_at_exit spawn_reaper",
    ),
    "RayParams": PrivateName(
        "ray._private.parameter:RayParams",
        "options of a node",
        "node_ip_address gcs_address gcs_server_port num_cpus object_store_memory "
        "include_dashboard dashboard_host dashboard_port dashboard_agent_listen_port "
        "include_log_monitor temp_dir external_addresses num_redis_shards redis_username "
        "redis_password",
    ),
    "cleanup_redis_storage": PrivateName(
        "ray._private.gcs_utils:cleanup_redis_storage",
        "end of a cluster whose GCS has its state in Redis",
        "host port password use_ssl storage_namespace username",
    ),
    "write_ray_address": PrivateName(
        "ray._private.utils:write_ray_address", "address that `ray.init()` of other jobs finds"
    ),
    "create_controller": PrivateName(
        f"{_SERVE}.api:_create_controller_and_proxy_refs",
        "start of Serve without waiting for its proxies",
        "http_options grpc_options global_logging_config global_tracing_config controller_options "
        "proxy_location",
    ),
    "coerce_controller_options": PrivateName(
        f"{_SERVE}.api:_coerce_controller_options", "options of ``create_controller``"
    ),
}
"""Names that other modules import from here."""

MEMBERS = (
    PrivateName(f"{_SERVE}.long_poll:LongPollNamespace.DEPLOYMENT_TARGETS", "running replicas"),
    PrivateName(f"{_SERVE}.long_poll:LongPollClient.stop", "end of a subscription"),
    PrivateName(
        f"{_SERVE}.long_poll:LongPollClient._process_update", "end after an error", "updates"
    ),
    PrivateName(f"{_NODE}.start_api_server", "start of the dashboard in the background"),
    PrivateName(f"{_NODE}.start_monitor", "start at a lower priority"),
    PrivateName(f"{_NODE}.get_temp_dir_path", "place of the address for other jobs"),
    PrivateName(f"{_NODE}.start_log_monitor", "start at a lower priority"),
    PrivateName(f"{_SERVE}.controller:ServeController.apply_config", "start of the application"),
    PrivateName(
        f"{_SERVE}.controller:ServeController.get_serve_instance_details", "application status"
    ),
    PrivateName(
        f"{_SERVE}.controller:ServeController.get_proxies", "proxies to which settings apply"
    ),
    PrivateName(f"{_SERVE}.controller:ServeController.get_http_config", "see ``get_http_host``"),
    PrivateName(f"{_SERVE}.haproxy:HAProxyConfig.timeout_http_request_s", "see ``proxy_setup``"),
    PrivateName(f"{_SERVE}.haproxy:HAProxyConfig.timeout_client_s", "see ``proxy_setup``"),
    PrivateName(f"{_SERVE}.haproxy:HAProxyConfig.hard_stop_after_s", "see ``proxy_setup``"),
    PrivateName(f"{_SERVE}.haproxy:HAProxyApi.start", "see ``proxy_setup``"),
    PrivateName(f"{_SERVE}.replica:SERVE_BUILD_ASGI_APP_METHOD", "hook of the router"),
    PrivateName(
        f"{_SERVE}.replica:start_asgi_http_server", "see ``wrap_http_app``", "app http_options"
    ),
    PrivateName(f"{_SERVE}.proxy_request_response:ASGIProxyRequest.headers", "see ``proxy_setup``"),
    PrivateName(f"{_SERVE}.constants:RECORD_REPLICA_METADATA_METHOD", "hook for link addresses"),
    PrivateName(f"{_SERVE}.config:DeploymentConfig.to_proto_bytes", "see ``pin_version``"),
    PrivateName(
        f"{_SERVE}.deployment_state:DeploymentState._BROADCAST_STATES",
        "see ``keep_updating_replicas``",
    ),
    PrivateName(
        f"{_SERVE}.deployment_state:DeploymentState.get_running_replica_infos",
        "see ``keep_updating_replicas``",
    ),
    PrivateName(
        f"{_SERVE}.deployment_state:DeploymentReplica.get_running_replica_info",
        "see ``keep_updating_replicas``",
        "cluster_node_info_cache",
    ),
    PrivateName("ray.serve.handle:DeploymentHandle._init", "see ``init_handle``"),
    PrivateName("ray.serve.handle:DeploymentHandle.is_initialized", "see ``init_handle``"),
    PrivateName(f"{_KV}_internal_kv_put", "key-value store", "key value overwrite namespace"),
    PrivateName(f"{_KV}_internal_kv_get", "key-value store", "key namespace"),
    PrivateName(f"{_KV}_internal_kv_exists", "key-value store", "key namespace"),
    PrivateName(f"{_KV}internal_kv_get_gcs_client", "key-value store with timeouts"),
    PrivateName(f"{_KV}_internal_kv_list", "key-value store", "prefix namespace"),
    PrivateName(f"{_KV}_internal_kv_del", "key-value store", "key del_by_prefix namespace"),
    PrivateName("ray.core.generated.gcs_pb2:GcsNodeInfo.ALIVE", "count of the live nodes"),
    PrivateName("ray._raylet:InnerGcsClient.get_draining_nodes", "nodes that will leave"),
    PrivateName("ray._raylet:InnerGcsClient.drain_node", "`tandem drain NODE`"),
    PrivateName("ray.core.generated.autoscaler_pb2:DrainNodeReason.Value", "`tandem drain NODE`"),
    PrivateName("ray._private.state:available_resources_per_node", "free resources of the nodes"),
    PrivateName(f"{_SERVE}.controller:ServeController.get_app_configs", "deployed configuration"),
    PrivateName("ray._raylet:GcsClient", "see ``read_remote_kv``"),
    PrivateName(
        "ray._private.ray_constants:KV_NAMESPACE_DASHBOARD", "see ``read_dashboard_address``"
    ),
)
"""Further names and members that must exist."""


def __getattr__(name: str) -> Any:
    if name not in EXPORTED:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return resolve(EXPORTED[name])


def resolve(private: PrivateName) -> Any:
    """Import and return a private name.

    Raises:
        RayIncompatibleError: the installed Ray does not have it, or without a parameter in use.
    """
    module, _, names = private.path.partition(":")
    try:
        found: Any = importlib.import_module(module)
        for name in names.split("."):
            found = getattr(found, name)
    except (ImportError, AttributeError):
        raise _incompatible(f"`{private.path}`", private.purpose) from None
    for parameter in private.parameters.split():
        if parameter not in inspect.signature(found).parameters:
            missing = f"the parameter `{parameter}` of `{private.path}`"
            raise _incompatible(missing, private.purpose)
    return found


def _incompatible(expected: str, purpose: str) -> RayIncompatibleError:
    return RayIncompatibleError(
        f"Ray {version('ray')} does not have {expected} ({purpose}). "
        f"Install Ray {RAY_VERSION}, or adapt cluster/ray_internals.py."
    )


# -- ports ------------------------------------------------------------------------------------

_GRPC_PORT = 'add_port_to_grpc_server(self._server, "[::]:0")'


def confine_replica_to_loopback() -> None:
    """Bind the gRPC server of this replica to loopback if the cluster is confined to it.

    Serve accepts pickled requests there on every address and has no setting for it. It starts the
    server after the deployment's constructor, so call this in the constructor.

    Raises:
        RayIncompatibleError: Serve starts the server in another way, so the port would be open.
    """
    if os.environ.get(LOOPBACK_VARIABLE) != "0":
        return
    from ray.serve._private import replica

    if _GRPC_PORT not in inspect.getsource(replica):
        expected = f"`{_GRPC_PORT}` in ray.serve._private.replica"
        raise _incompatible(expected, "keeps the port for calls between replicas on loopback")
    add_port = replica.add_port_to_grpc_server

    def add_loopback_port(server: Any, address: str) -> int:
        return int(add_port(server, address.replace("[::]", "127.0.0.1")))

    replica.add_port_to_grpc_server = add_loopback_port


HAPROXY_BINDS = (
    "bind :{{ config.metrics_port }}",
    "bind {{ config.frontend_host }}:{{ config.frontend_port }}",
    "bind {{ config.grpc_frontend_host }}:{{ config.grpc_frontend_port }} proto h2",
    "bind *:{{ config.stats_port }}",
)
"""All ``bind`` lines in Serve's HAProxy template: metrics, HTTP, gRPC and statistics.

``cluster.launch.environment`` rewrites the first and the last, which listen on every address and
for which Serve has no setting.
"""


def check_haproxy_template() -> None:
    """Check that HAProxy will listen only where ``HAPROXY_BINDS`` says.

    Raises:
        RayIncompatibleError: the template's ``bind`` lines differ, so ports could be open.
    """
    # Found without an import: `tandem up` does not load Serve.
    spec = importlib.util.find_spec("ray")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    template = Path(spec.submodule_search_locations[0], "serve/_private/haproxy_templates.py")
    lines = template.read_text(encoding="utf-8").splitlines() if template.is_file() else []
    binds = tuple(line.strip() for line in lines if line.strip().startswith("bind "))
    if binds != HAPROXY_BINDS:
        expected = f"exactly the lines {'; '.join(HAPROXY_BINDS)} in {template}, but "
        found = "; ".join(binds) or "none"
        raise _incompatible(expected + found, "keeps HAProxy's metrics and statistics on loopback")


async def get_http_host(timeout_s: float) -> str | None:
    """Return the address on which Serve's HTTP listens; None for all addresses.

    It cannot change while Serve runs.

    Raises:
        TimeoutError: Serve's controller does not answer in time.
    """
    async with asyncio.timeout(timeout_s):
        options = await _controller().get_http_config.remote()
    host: str | None = options.host
    return host


# -- HTTP proxies -----------------------------------------------------------------------------

_HTTP_ERRORS = {
    400: ("invalid_request_error", "The request is not valid HTTP."),
    408: ("timeout_error", "The request did not arrive in time. Send it faster."),
    500: ("api_error", "The HTTP proxy failed. Try again."),
    502: ("api_error", "The router was lost before it answered. Try again."),
    503: ("overloaded_error", "No router is available. Try again."),
    504: ("api_error", "The router did not answer in time. Try again."),
}
"""Type and message of HAProxy's own errors, by status; bodies have the fields of both vendors."""


def _http_errors() -> str:
    """Return HAProxy's directives for ``_HTTP_ERRORS``."""
    lines = []
    for status, (kind, message) in _HTTP_ERRORS.items():
        error = {"message": message, "type": kind, "param": None, "code": status}
        body = json.dumps({"type": "error", "error": error})
        lines.append(
            f"    http-error status {status} content-type application/json string '{body}'\n"
        )
    return "".join(lines)


_SERVER = "    server {{ server.name }} {{ server.host }}:{{ server.port }} check{% if"
_LOCAL = """\
    {%- set has_local = "127.0.0.1" in backend.servers | map(attribute="host") %}
"""
_SERVERS = "    # Servers in this backend\n    {%- for server in backend.servers %}\n"

HAPROXY_EDITS = {
    _SERVERS + _SERVER: _LOCAL
    + _SERVERS
    + _SERVER.removesuffix("{% if")
    + """{% if has_local and server.host != "127.0.0.1" %} backup{% endif %}{% if""",
    "    option splice-request\n": "",
    "    bind {{ config.frontend_host }}:{{ config.frontend_port }}\n": """\
    bind {{ config.frontend_host }}:{{ config.frontend_port }}
    stick-table type ipv6 size 100k expire 1m store conn_cur
    tcp-request connection track-sc0 src
    tcp-request connection reject if { sc0_conn_cur gt $max_connections_per_address }
    http-request wait-for-body time ${header_timeout_s}s at-least 15k if { method POST PUT PATCH }
    http-request del-header x-request-disconnect-disabled
    http-request disable-l7-retry unless METH_GET or { req.hdr(idempotency-key) -m found }
""",
    "    retry-on {{ config.retry_on }}\n": "    retry-on {{ config.retry_on }} empty-response\n",
    """    {%- if config.error_file_path %}
    errorfile 502 {{ config.error_file_path }}
    errorfile 503 {{ config.error_file_path }}
    errorfile 504 {{ config.error_file_path }}
    {%- endif %}
""": _http_errors(),
}
"""Replacements in Serve's HAProxy template by the text that they replace.

- With ``option splice-request``, HAProxy 2.8 does not notice a client that wrote headers and body
  separately and disconnects: the request runs on, and a thread spins.
- Connections per address are limited, and the start of a body (15 KiB fit into HAProxy's buffer)
  has a deadline.
- A node uses the routers of other nodes only while it has none, so the death of a node breaks no
  connection to the others.
- If a router dies before the first byte of an answer, another router gets the request, provided
  that it may be repeated: the answer belongs to its key. HAProxy repeats only what fits into its
  buffer.
- HAProxy's own errors are JSON. Serve's file, which the backends inherit, would make a 500 in plain
  text of 502, 503 and 504.
- The deleted header would make Serve ignore that a client disconnects.
"""


CERTIFICATE_RENEWAL_S = 10.0
"""Interval between checks for a renewed certificate, in seconds."""


EMPTY_BACKEND_S = 15.0
"""Time for which an empty list of an application's routers is ignored, in seconds.

Serve sends one for some seconds during each deployment. HAProxy's health checks notice if the
routers are really gone; it then uses its backup, Serve's own proxy.
"""
DELETE_SERVERS_S = 5.0
"""Interval of deleting removed servers, whose streams can last for hours, in seconds."""


class ProxySettings(NamedTuple):
    """Limits of Serve's HTTP proxies; the same for all applications of a cluster."""

    header_timeout_s: int
    """Time for a client to send the header and the first 15 KiB of a body, in seconds."""
    client_timeout_s: int
    """Time after which a client that neither sends nor reads is disconnected, in seconds."""
    max_connections_per_address: int
    """Open connections of one address to one HAProxy."""
    drain_s: int
    """Time for which a replaced HAProxy process finishes its requests, in seconds."""
    certificate: str | None = None
    """File of each node with the certificate chain for HTTPS; None for HTTP."""
    key: str | None = None
    """File of each node with the private key."""


def proxy_setup(settings: ProxySettings) -> Callable[[Any], str]:
    """Return a function for ``__ray_call__`` of an actor of Serve's HTTP proxy.

    It applies ``settings``, adds and removes HAProxy's servers without a reload, and restarts
    HAProxy at once if it dies, which Serve itself notices after 30 s. It returns an empty string,
    or what this release of Serve does differently. If the certificate cannot be read, HAProxy
    listens on loopback only, and the function raises OSError.

    The function is pickled by value, because a proxy may be unable to import this package. So it
    uses no global name of this module.
    """
    edits = {
        old: Template(new).substitute(settings._asdict()) for old, new in HAPROXY_EDITS.items()
    }
    renewal_s = CERTIFICATE_RENEWAL_S
    timeouts = {
        "timeout_http_request_s": settings.header_timeout_s,
        "timeout_client_s": settings.client_timeout_s,
        "hard_stop_after_s": settings.drain_s,
    }

    certificate, key = settings.certificate, settings.key
    compare_servers, is_emptied = server_comparison()
    empty_s, delete_s = EMPTY_BACKEND_S, DELETE_SERVERS_S

    def set_up(actor: Any) -> str:
        import asyncio
        import contextlib
        import logging
        import os
        import time

        from ray.serve._private import haproxy
        from ray.serve._private.proxy_request_response import ASGIProxyRequest

        logger = logging.getLogger("ray.serve.tandem")

        def write_pem(path: str) -> bool:
            """Write certificate and key into HAProxy's file; return True if it changed."""
            content = b""
            for source in (certificate, key):
                with open(source or "", "rb") as file:
                    content += file.read().rstrip() + b"\n"
            try:
                with open(path, "rb") as file:
                    if file.read() == content:
                        return False
            except FileNotFoundError:
                pass
            new = f"{path}.{os.getpid()}"
            with open(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
                file.write(content)
            os.replace(new, path)
            return True

        async def renew_certificate() -> None:
            while True:
                await asyncio.sleep(renewal_s)
                try:
                    if write_pem(pem):
                        actor._haproxy._tandem_running = None  # so that it is reloaded
                        actor._schedule_haproxy_update()
                except OSError as error:
                    logger.error("HAProxy keeps its certificate: %s", error)

        async def command_haproxy(command: str, answer: str = "") -> None:
            found = (await actor._haproxy._send_socket_command(command)).strip()
            if found != answer:
                raise RuntimeError(f"HAProxy answers {found!r} to {command!r}")

        def read_config() -> str:
            with open(actor._haproxy.config_file_path, encoding="utf-8") as file:
                return file.read()

        async def update_servers(running: str | None, config: str) -> bool:
            """Return True if HAProxy now runs with ``config``, without a reload."""
            changes = None if running is None else compare_servers(running, config)
            if changes is None:
                return False
            removed = actor._haproxy._tandem_removed
            try:
                for server, commands in changes[0].items():
                    if server in removed:  # it is back, and was not deleted yet
                        await command_haproxy(f"set server {server} state ready")
                        removed.discard(server)
                        continue
                    for command, answer in commands:
                        await command_haproxy(command, answer)
                for server in changes[1]:
                    await command_haproxy(f"set server {server} state maint")
                    removed.add(server)
            except RuntimeError as error:
                logger.warning("HAProxy is reloaded: %s", error)
                return False
            return True

        async def update_haproxy() -> None:
            api = actor._haproxy
            running, config = api._tandem_running, read_config()
            now = time.monotonic()
            if running is not None and is_emptied(running, config):
                api._tandem_emptied = emptied = api._tandem_emptied or now
                if now - emptied < empty_s:
                    actor.event_loop.call_later(empty_s, actor._schedule_haproxy_update)
                    return
            api._tandem_emptied = api._tandem_running = None
            if not await update_servers(running, config):
                for server in api._tandem_removed:  # the new process takes over the states
                    with contextlib.suppress(RuntimeError):
                        await command_haproxy(f"set server {server} state ready")
                await api._tandem_reload()
                api._tandem_removed.clear()
            api._tandem_running = config

        async def delete_removed() -> None:
            """Delete removed servers; this fails while they have connections."""
            async with actor._reload_lock:
                for server in list(actor._haproxy._tandem_removed):
                    with contextlib.suppress(RuntimeError):
                        await command_haproxy(f"del server {server}", "Server deleted.")
                        actor._haproxy._tandem_removed.discard(server)

        async def keep_running() -> None:
            api, deleted_s = actor._haproxy, 0.0
            while True:
                await asyncio.sleep(0.2)
                dead = api._proc
                if dead is None or dead.returncode is None:
                    if api._tandem_removed and time.monotonic() - deleted_s > delete_s:
                        await delete_removed()
                        deleted_s = time.monotonic()
                    continue
                # SIGTERM ends a whole cluster: `down` kills this process within a second. Serve's
                # own stop kills HAProxy, then clears `_proc`.
                await asyncio.sleep(2.0 if dead.returncode in (-15, 128 + 15) else 0.1)
                async with actor._reload_lock:
                    if api._proc is not dead:
                        continue
                    logger.error("HAProxy died (%s); restarting it", dead.returncode)
                    try:
                        await api.start()
                        api._old_procs.append(dead)
                        api._tandem_running = None
                        api._tandem_removed.clear()
                    except Exception:
                        logger.exception("HAProxy does not start")
                        await asyncio.sleep(1)

        # Serve's own proxy, also HAProxy's fallback, fails on headers that are not UTF-8 and would
        # obey the hidden ones. The router gets all headers.
        hidden = (b"x-request-timeout-seconds", b"x-request-disconnect-disabled")
        ASGIProxyRequest.headers = property(
            lambda request: [
                (name, value)
                for name, value in request.scope["headers"]
                if name.isascii() and value.isascii() and name.lower() not in hidden
            ]
        )
        if not hasattr(actor, "_haproxy"):
            return ""
        names = ("_haproxy", "_reload_lock", "_schedule_haproxy_update", "event_loop")
        missing = [name for name in names if not hasattr(actor, name)]
        config = getattr(actor._haproxy, "cfg", None)
        methods = ("_graceful_reload", "_send_socket_command")
        missing += [name for name in methods if not hasattr(actor._haproxy, name)]
        missing += [name for name in timeouts if not hasattr(config, name)]
        serve_template = getattr(haproxy, "_tandem_original", haproxy.HAPROXY_CONFIG_TEMPLATE)
        missing += [text.strip() for text in edits if serve_template.count(text) != 1]
        if missing:
            return ", ".join(missing)

        template = serve_template
        for old, new in edits.items():
            template = template.replace(old, new)
        plain = bind = "bind {{ config.frontend_host }}:{{ config.frontend_port }}"
        failure = None
        pem = os.path.join(os.path.dirname(actor._haproxy.config_file_path), "tls.pem")
        if certificate is not None:
            try:
                write_pem(pem)
                bind = f"{plain} ssl crt {pem} ssl-min-ver TLSv1.2 alpn h2,http/1.1"
            except OSError as error:
                bind, failure = "bind 127.0.0.1:{{ config.frontend_port }}", error
        template = template.replace(f"{plain}\n", f"{bind}\n")
        before = (haproxy.HAPROXY_CONFIG_TEMPLATE, *(getattr(config, name) for name in timeouts))
        haproxy._tandem_original = serve_template
        haproxy.HAPROXY_CONFIG_TEMPLATE = template
        for name, value in timeouts.items():
            setattr(config, name, value)

        api = actor._haproxy
        if not hasattr(api, "_tandem_reload"):
            api._tandem_reload = api._graceful_reload
            api._tandem_running, api._tandem_removed = None, set()
            api._tandem_emptied = None
        api._graceful_reload = update_haproxy

        def apply() -> None:
            if not hasattr(actor, "_tandem_guard"):
                actor._tandem_guard = asyncio.ensure_future(keep_running())
            if renewal := getattr(actor, "_tandem_renewal", None):
                renewal.cancel()
            if certificate is not None and failure is None:
                actor._tandem_renewal = asyncio.ensure_future(renew_certificate())
            # Without targets the first broadcast of the controller will reload HAProxy.
            if actor._target_groups and before != (template, *timeouts.values()):
                actor._schedule_haproxy_update()

        actor.event_loop.call_soon_threadsafe(apply)
        if failure is not None:
            raise failure
        return ""

    return set_up


def wrap_http_app(wrap: Callable[[Any], Any], host: str | None) -> None:
    """Let this replica's HTTP server call ``wrap(app)`` instead of Serve's ASGI application.

    It listens on ``host`` unless that is None. Serve itself uses ``http_options.host``, where
    HAProxy may not find it: that dials 127.0.0.1 on its own node, and the address of other nodes.
    Serve starts the server after the deployment's constructor, so call this in the constructor.

    Raises:
        RayIncompatibleError: Serve starts the server in another way.
    """
    from ray.serve._private import replica

    if not hasattr(replica, "start_asgi_http_server"):
        expected = "`ray.serve._private.replica:start_asgi_http_server`"
        raise _incompatible(expected, "formats errors, and hides headers that Serve cannot read")
    start = replica.start_asgi_http_server

    def start_wrapped(app: Any, options: Any, **kwargs: Any) -> Any:
        own = options if host is None else options.model_copy(update={"host": host})
        return start(wrap(app), own, **kwargs)

    replica.start_asgi_http_server = start_wrapped


# -- handles ----------------------------------------------------------------------------------


def pin_version(deployment: Any, code_version: str) -> None:
    """Set the version of a deployment.

    Serve's version is a hash of the whole application's arguments, so that any change of them would
    replace the replicas of all deployments. Serve assigns it after ``build`` returns.
    """
    from pydantic import PrivateAttr
    from ray.serve._private.config import DeploymentConfig

    class PinnedConfig(DeploymentConfig):  # type: ignore[misc]  # Ray is not typed
        _pinned_version: str = PrivateAttr(code_version)

        def to_proto_bytes(self) -> bytes:
            self.version = self._pinned_version
            encoded: bytes = super().to_proto_bytes()
            return encoded

    config = deployment._deployment_config
    deployment._deployment_config = PinnedConfig.model_construct(
        config.model_fields_set, **dict(config)
    )


def keep_updating_replicas() -> None:
    """Have Serve's controller, this process, list replicas while it reconfigures them.

    It takes them out of the list for a moment, although they go on serving. HAProxy would have no
    router in that moment if there is one only, and routers would move their answers.
    """
    from ray.serve._private.deployment_state import DeploymentState, ReplicaState

    listed = frozenset({*DeploymentState._BROADCAST_STATES, ReplicaState.UPDATING})

    def get_running_replica_infos(self: Any) -> list[Any]:
        nodes = self._cluster_node_info_cache
        return [each.get_running_replica_info(nodes) for each in self._replicas.get([*listed])]

    DeploymentState._BROADCAST_STATES = listed
    DeploymentState.get_running_replica_infos = get_running_replica_infos


def init_handle(handle: Any) -> None:
    """Make a deployment handle usable by threads without an event loop.

    Clusters tuned for throughput tell their jobs to route in the caller's event loop, which
    synchronous callers do not have. Serve shares one handle within a process.
    """
    if not handle.is_initialized:
        handle._init(_run_router_in_separate_loop=True)


# -- configuration ----------------------------------------------------------------------------


async def read_serve_config() -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the deployed configuration of each application, and the details of Serve's state."""
    controller = _controller()
    configs = await controller.get_app_configs.remote()
    return configs, await controller.get_serve_instance_details.remote()


async def apply_serve_config(applications: Sequence[Any], target_capacity: float | None) -> None:
    """Have Serve deploy exactly these applications, as ``serve deploy`` does."""
    from ray.serve.schema import ServeDeploySchema

    schema = ServeDeploySchema(applications=list(applications), target_capacity=target_capacity)
    await _controller().apply_config.remote(schema)


def _controller() -> Any:
    import ray

    name, namespace = (EXPORTED[f"SERVE_{key}"] for key in ("CONTROLLER_NAME", "NAMESPACE"))
    return ray.get_actor(resolve(name), namespace=resolve(namespace))


# -- key-value store of the GCS ---------------------------------------------------------------

_NAMESPACE = b"tandem"
KEYS_KEY = b"keys"
"""Key of the API keys' digests and limits, in the format of the key file."""


def kv_put_if_absent(key: bytes, value: bytes) -> bool:
    """Store a value unless the key exists; return True if it was stored."""
    from ray.experimental import internal_kv

    return not internal_kv._internal_kv_put(key, value, overwrite=False, namespace=_NAMESPACE)


def kv_get(key: bytes) -> bytes | None:
    """Return the value of a key, or None."""
    from ray.experimental import internal_kv

    value: bytes | None = internal_kv._internal_kv_get(key, namespace=_NAMESPACE)
    return value


def kv_exists(key: bytes) -> bool:
    """Return True if the key exists."""
    from ray.experimental import internal_kv

    return bool(internal_kv._internal_kv_exists(key, namespace=_NAMESPACE))


def kv_put(key: bytes, value: bytes, timeout_s: float) -> None:
    """Store a value; raise a RayError after the timeout."""
    from ray.experimental import internal_kv

    gcs = internal_kv.internal_kv_get_gcs_client()
    gcs.internal_kv_put(key, value, True, namespace=_NAMESPACE, timeout=timeout_s)


def kv_get_many(keys: Sequence[bytes], timeout_s: float) -> list[bytes]:
    """Return the values of those keys that exist; raise a RayError after the timeout."""
    from ray.experimental import internal_kv

    gcs = internal_kv.internal_kv_get_gcs_client()
    found = gcs.internal_kv_multi_get(list(keys), namespace=_NAMESPACE, timeout=timeout_s)
    return list(found.values())


class RayNode(NamedTuple):
    """A live node."""

    id: str
    ip: str
    is_head: bool


def live_nodes(timeout_s: float) -> list[RayNode]:
    """Return the live nodes; raise a RayError after the timeout."""
    from ray.core.generated import gcs_pb2
    from ray.experimental import internal_kv

    nodes = internal_kv.internal_kv_get_gcs_client().get_all_node_info(timeout=timeout_s)
    return [
        RayNode(node.node_id.hex(), node.node_manager_address, node.is_head_node)
        for node in nodes.values()
        if node.state == gcs_pb2.GcsNodeInfo.ALIVE
    ]


def draining_nodes(timeout_s: float) -> frozenset[str]:
    """Return the ids of the nodes that drain; raise a RayError after the timeout."""
    from ray.experimental import internal_kv

    gcs = internal_kv.internal_kv_get_gcs_client()
    return frozenset(gcs.get_draining_nodes(timeout=timeout_s))


def drain_node(node_id: str, message: str, timeout_s: float) -> str:
    """Have Ray drain a node, however long it takes; return why it refuses, or an empty string.

    Raises:
        RayError: The timeout has passed.
    """
    from ray.core.generated import autoscaler_pb2
    from ray.experimental import internal_kv

    gcs = internal_kv.internal_kv_get_gcs_client()
    # A drain for another reason is refused unless the node is idle.
    reason = autoscaler_pb2.DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
    accepted, refusal = gcs.drain_node(node_id, reason, message, 0, timeout=timeout_s)
    return "" if accepted else refusal or "no reason given"


def kv_get_prefix(prefix: bytes, timeout_s: float) -> list[bytes]:
    """Return the values of all keys with a prefix; raise a RayError after the timeout."""
    from ray.experimental import internal_kv

    keys = internal_kv._internal_kv_list(prefix, namespace=_NAMESPACE)
    return kv_get_many(keys, timeout_s) if keys else []


def kv_delete(key: bytes) -> None:
    """Delete one key."""
    from ray.experimental import internal_kv

    internal_kv._internal_kv_del(key, namespace=_NAMESPACE)


def kv_delete_prefix(prefix: bytes) -> None:
    """Delete all keys with a prefix."""
    from ray.experimental import internal_kv

    internal_kv._internal_kv_del(prefix, del_by_prefix=True, namespace=_NAMESPACE)


def free_resources() -> list[dict[str, float]]:
    """Return the resources of each live node that nothing has reserved."""
    from ray._private import state

    return list(state.available_resources_per_node().values())


def read_remote_kv(gcs_address: str, key: bytes, timeout_s: float) -> bytes | None:
    """Return the value of a key in a cluster that this process is not connected to, or None.

    Raises:
        RayError: The GCS does not answer in time, or rejects the token.
    """
    from ray._raylet import GcsClient  # type: ignore[attr-defined]  # Cython

    client = GcsClient(address=gcs_address)
    value: bytes | None = client.internal_kv_get(key, _NAMESPACE, timeout=timeout_s)
    return value


def read_dashboard_address(gcs_address: str, timeout_s: float) -> str | None:
    """Return host and port of the dashboard of a cluster, or None.

    Raises:
        RayError: The GCS does not answer in time, or rejects the token.
    """
    from ray._private import ray_constants
    from ray._raylet import GcsClient  # type: ignore[attr-defined]  # Cython

    namespace = ray_constants.KV_NAMESPACE_DASHBOARD
    client = GcsClient(address=gcs_address)
    address = client.internal_kv_get(b"webui:url", namespace, timeout=timeout_s)
    return address.decode() if address else None


def write_remote_kv(gcs_address: str, key: bytes, value: bytes, timeout_s: float) -> None:
    """Store a value in a cluster that this process is not connected to.

    Raises:
        RayError: The GCS does not answer in time, or rejects the token.
    """
    from ray._raylet import GcsClient  # type: ignore[attr-defined]  # Cython

    client = GcsClient(address=gcs_address)
    client.internal_kv_put(key, value, True, _NAMESPACE, timeout=timeout_s)


def count_cpu_nodes(min_cpus: float, timeout_s: float) -> int:
    """Return the number of live nodes with CPUs, at least ``min_cpus`` of them.

    Raises:
        RayError: The timeout has passed.
    """
    from ray.core.generated import gcs_pb2
    from ray.experimental import internal_kv

    nodes = internal_kv.internal_kv_get_gcs_client().get_all_node_info(timeout=timeout_s)
    alive = gcs_pb2.GcsNodeInfo.ALIVE
    cpus = [node.resources_total.get("CPU", 0) for node in nodes.values() if node.state == alive]
    return sum(number > 0 and number >= min_cpus for number in cpus)
