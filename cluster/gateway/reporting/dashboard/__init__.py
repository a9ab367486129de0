"""What ``GET /dashboard`` and ``tandem top`` show: the last minutes of all routers.

``history`` keeps each second of this router, ``board`` adds up the seconds of all routers and makes
rates and percentiles of them, ``service`` samples, asks the other routers and answers requests.
"""

from cluster.gateway.reporting.dashboard.service import (
    DATA_PATH,
    REPORT_PATH,
    Dashboard,
    ReadDecisions,
)

__all__ = ["DATA_PATH", "REPORT_PATH", "Dashboard", "ReadDecisions"]
