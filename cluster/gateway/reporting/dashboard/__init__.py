"""Data of ``GET /dashboard`` and ``tandem top``: the last minutes of all routers.

``history`` samples this router every second, ``board`` merges the seconds of all routers into rates
and percentiles, and ``service`` queries the other routers and answers requests.
"""

from cluster.gateway.reporting.dashboard.service import (
    DATA_PATH,
    REPORT_PATH,
    Dashboard,
    ReadDecisions,
)

__all__ = ["DATA_PATH", "REPORT_PATH", "Dashboard", "ReadDecisions"]
