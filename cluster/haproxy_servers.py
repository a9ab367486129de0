"""Changes of HAProxy's servers without a reload.

A reload starts a new process, and the old one serves its connections with the servers that it
knows. If all of these are replaced, a client that keeps its connection gets 503.
"""

from collections.abc import Callable

ServerChanges = tuple[dict[str, list[tuple[str, str]]], list[str]]
"""Servers to add, each with commands for HAProxy's socket and their answers; servers to remove."""


def server_comparison() -> tuple[
    Callable[[str, str], ServerChanges | None], Callable[[str, str], bool]
]:
    """Return two functions that compare two configurations of HAProxy.

    The first one returns the changes of servers, which are named BACKEND/SERVER, or None if
    anything else differs, so that HAProxy must be reloaded. The second one returns True if a
    backend has lost all servers but its backup.

    They are pickled by value with the function that uses them, which
    ``haproxy_internals.proxy_setup`` returns.
    """

    def parse(config: str) -> tuple[list[str], dict[str, str], dict[str, str]]:
        """Return all other lines, servers with their options, and backends with the defaults."""
        others, servers, defaults, section = [], {}, {}, ""
        for line in config.splitlines():
            words = line.split()
            if words[:1] == ["server"]:
                servers[f"{section}/{words[1]}"] = " ".join(words[2:])
                continue
            if words[:1] == ["default-server"]:
                defaults[section] = " ".join(words[1:])
            if line[:1].strip():
                section = words[-1]
            others.append(line)
        return others, servers, defaults

    def compare(old: str, new: str) -> ServerChanges | None:
        others, before, _ = parse(old)
        new_others, after, defaults = parse(new)
        common = before.keys() & after.keys()
        if others != new_others or any(before[name] != after[name] for name in common):
            return None
        adding = {}
        for name in sorted(after.keys() - before.keys()):
            # HAProxy does not apply default-server to servers that are added at run time.
            default = defaults.get(name.partition("/")[0], "")
            adding[name] = [
                (f"add server {name} {after[name]} {default}".rstrip(), "New server registered."),
                (f"enable server {name}", ""),
                (f"enable health {name}", ""),
            ]
        return adding, sorted(before.keys() - after.keys())

    def is_emptied(old: str, new: str) -> bool:
        def backends(config: str) -> set[str]:
            servers = parse(config)[1].items()
            return {
                name.partition("/")[0] for name, text in servers if "backup" not in text.split()
            }

        sections = {line.split()[-1] for line in new.splitlines() if line.startswith("backend ")}
        return bool((backends(old) - backends(new)) & sections)

    return compare, is_emptied
