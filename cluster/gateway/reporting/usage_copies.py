"""Copies of other nodes' usage, so that it survives the loss of a node."""

from cluster.gateway.recording.usage import UsageAccount
from cluster.gateway.reporting.usage_report import (
    DAY_S,
    QUERY_TIMEOUT_S,
    ROWS_PATH,
    decode_rows,
    rows_query,
)
from cluster.gateway.router_links import RouterLinks, fetch
from cluster.periodic import Periodic

COPY_S = 60.0
"""Seconds between two copies; a lost node loses the usage of at most this time."""
WINDOW_S = 2 * 3600.0
"""Seconds before now that are copied each time, because sums of the last hour still change."""


class UsageCopies:
    """Copies the sums of the other routers' nodes into this node's file every minute."""

    def __init__(self, account: UsageAccount, routers: RouterLinks) -> None:
        self._account = account
        self._routers = routers
        self._known: set[str] = set()
        """Ids of the routers whose last day was copied."""
        self._periodic = Periodic("copying usage of other nodes", COPY_S, self.copy)

    async def copy(self) -> None:
        """Copy the last hours of all other nodes; the last day from new routers.

        Raises:
            sqlite3.Error: The file cannot be read or written.
        """
        own = await self._account.file_id()
        now = self._account.clock()
        links = dict(self._routers.links())
        self._known &= links.keys()
        for id_, link in links.items():
            window_s = WINDOW_S if id_ in self._known else DAY_S
            query = rows_query(now - window_s, now)
            body = await fetch(link, ROWS_PATH, query, QUERY_TIMEOUT_S)
            if body is None:  # tried again in a minute
                continue
            file_id, rows = decode_rows(body)
            if file_id != own:
                await self._account.store_copy(file_id, rows)
            self._known.add(id_)

    async def close(self) -> None:
        """Stop copying."""
        await self._periodic.close()
