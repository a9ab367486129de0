"""Private names of Ray Serve's HAProxy, its configuration and its socket; see ``ray_internals``."""

import functools
import importlib.util
import json
import os
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from string import Template
from typing import Any, NamedTuple

from cluster.haproxy_servers import server_comparison
from cluster.ray_internals import PrivateName, incompatible, server_rest, signal_rest
from cluster.router_sockets import open_router_socket, socket_checks

_SERVE = "ray.serve._private"

MEMBERS = (
    PrivateName(f"{_SERVE}.haproxy:HAProxyConfig.timeout_http_request_s", "see ``proxy_setup``"),
    PrivateName(f"{_SERVE}.haproxy:HAProxyConfig.timeout_client_s", "see ``proxy_setup``"),
    PrivateName(f"{_SERVE}.haproxy:HAProxyConfig.hard_stop_after_s", "see ``proxy_setup``"),
    PrivateName(f"{_SERVE}.haproxy:HAProxyApi.start", "see ``proxy_setup``"),
    PrivateName(f"{_SERVE}.constants:RAY_SERVE_ENABLE_HA_PROXY", "see ``router_socket_opener``"),
    PrivateName(
        f"{_SERVE}.constants:RAY_SERVE_HAPROXY_SOCKET_PATH", "see ``router_socket_opener``"
    ),
    PrivateName(f"{_SERVE}.proxy_request_response:ASGIProxyRequest.headers", "see ``proxy_setup``"),
)
"""Names and members that must exist."""

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
        raise incompatible(expected + found, "keeps HAProxy's metrics and statistics on loopback")


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


def router_socket_opener() -> Callable[[int], socket.socket] | None:
    """Return a function that opens this router's Unix socket for HAProxy, given its HTTP port.

    Return None if this node has no HAProxy. The function raises OSError.
    """
    import ray
    from ray.serve._private import constants

    if sys.platform != "linux" or not constants.RAY_SERVE_ENABLE_HA_PROXY:
        return None
    parent = os.path.dirname(constants.RAY_SERVE_HAPROXY_SOCKET_PATH)
    directory = os.path.join(parent, ray.get_runtime_context().get_node_id())
    return functools.partial(open_router_socket, directory)


_SERVER = "    server {{ server.name }} {{ server.host }}:{{ server.port }} check{% if"
_LOCAL = """\
    {%- set sockets = "unix@" ~ config.socket_path.rpartition("/")[0] ~ "/router" %}
    {%- set local = ["127.0.0.1", sockets] %}
    {%- set has_local = backend.servers | selectattr("host", "in", local) | first is defined %}
"""
_SERVERS = "    # Servers in this backend\n    {%- for server in backend.servers %}\n"

HAPROXY_EDITS = {
    _SERVERS + _SERVER: _LOCAL
    + _SERVERS
    + _SERVER.removesuffix("{% if")
    + """{% if has_local and server.host not in local %} backup{% endif %}{% if""",
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
PROCESS_CHECK_S = 1.0
"""Interval of looking whether a reload has replaced HAProxy's process, in seconds."""
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

    It applies ``settings``, connects HAProxy to the routers' Unix sockets, adds and removes its
    servers without a reload, and restarts it at once if it dies, which Serve itself notices after
    30 s. It returns an empty string, or what this release of Serve does differently. If the
    certificate cannot be read, HAProxy listens on loopback only, and the function raises OSError.

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
    _, is_usable = socket_checks()
    empty_s, delete_s, check_s = EMPTY_BACKEND_S, DELETE_SERVERS_S, PROCESS_CHECK_S
    rests = signal_rest(), server_rest()

    def set_up(actor: Any) -> str:
        import asyncio
        import contextlib
        import functools
        import logging
        import os
        import time

        from ray.serve._private import haproxy
        from ray.serve._private.proxy_request_response import ASGIProxyRequest

        logger = logging.getLogger("ray.serve.tandem")
        for rest in rests:
            rest()

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

        @functools.lru_cache(maxsize=1024)  # a server that changes would need a reload
        def has_socket(name: str, port: int) -> bool:
            return is_usable(f"{sockets}:{port}")  # see ``router_sockets.router_socket``

        def target_to_server(target: Any) -> Any:
            server = actor._tandem_target_to_server(target)
            if server.host == "127.0.0.1" and has_socket(server.name, server.port):
                server.host = f"unix@{sockets}"
            return server

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
                process = api._proc
                # One wait for each process, because asyncio keeps cancelled ones until its end.
                end = asyncio.sleep(check_s) if process is None else process.wait()
                ended = asyncio.ensure_future(end)
                try:
                    while api._proc is process and not ended.done():
                        await asyncio.wait({ended}, timeout=check_s)
                        is_due = time.monotonic() - deleted_s > delete_s
                        if is_due and api._tandem_removed and not ended.done():
                            await delete_removed()
                            deleted_s = time.monotonic()
                finally:
                    ended.cancel()
                if process is not None and process.returncode is not None:
                    await restart(process)

        async def restart(dead: Any) -> None:
            """Start HAProxy again, unless its end was intended."""
            # SIGTERM ends a whole cluster: `down` kills this process within a second. Serve's own
            # stop kills HAProxy, then clears `_proc`.
            await asyncio.sleep(2.0 if dead.returncode in (-15, 128 + 15) else 0.1)
            api = actor._haproxy
            async with actor._reload_lock:
                if api._proc is not dead:
                    return
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
        names = ("_haproxy", "_reload_lock", "_schedule_haproxy_update", "_target_to_server")
        missing = [name for name in (*names, "event_loop") if not hasattr(actor, name)]
        config = getattr(actor._haproxy, "cfg", None)
        methods = ("_graceful_reload", "_send_socket_command")
        missing += [name for name in methods if not hasattr(actor._haproxy, name)]
        missing += [name for name in (*timeouts, "socket_path") if not hasattr(config, name)]
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
        sockets = os.path.join(os.path.dirname(api.cfg.socket_path), "router")
        if not hasattr(api, "_tandem_reload"):
            api._tandem_reload = api._graceful_reload
            api._tandem_running, api._tandem_removed = None, set()
            api._tandem_emptied = None
        api._graceful_reload = update_haproxy
        if not hasattr(actor, "_tandem_target_to_server"):
            actor._tandem_target_to_server = actor._target_to_server
            actor._target_to_server = target_to_server

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
