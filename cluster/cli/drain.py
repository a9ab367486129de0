"""``tandem drain``."""

from typing import Any
from urllib.parse import quote

from rich.console import Console

from cluster.cli.defaults import router_url
from cluster.cli.router_client import DRAIN_PATH, connect


def run(target: str, url: str | None, key: str | None) -> None:
    """Drain a replica or node.

    Raises:
        TandemError: There is no such replica or node, it is not unique, or it cannot be drained.
    """
    with connect(router_url(url), key) as router:
        drain = router.post(f"{DRAIN_PATH}?target={quote(target, safe='')}", {})
    Console(soft_wrap=True).print(_describe(drain), highlight=False, markup=False)


def _describe(drain: dict[str, Any]) -> str:
    if drain["kind"] == "replica":
        return (
            f"Replica {drain['id']} of {drain['model']} drains. Its answers move to other replicas "
            f"or finish, {drain['in_flight']} at this router; then Serve replaces it."
        )
    count = len(drain["replicas"])
    names = ", ".join(f"{replica['id']} ({replica['model']})" for replica in drain["replicas"])
    moved = f"Serve moves its {count} replica(s) to other nodes: {names}." if count else ""
    return f"Node {drain['ip']} ({drain['id']}) drains; Ray ends it once it is idle. {moved}"
