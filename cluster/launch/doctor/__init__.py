"""``doctor``: looks at everything that a cluster hangs on, and says of each what to do.

Each module looks at one kind of thing and changes nothing; a check that itself fails is a finding.
"""

from cluster.launch.doctor.examine import examine
from cluster.launch.doctor.finding import Finding, Level

__all__ = ["Finding", "Level", "examine"]
