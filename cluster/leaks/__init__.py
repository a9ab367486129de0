"""Memory leaks: find processes that grow without bound, and replace their replicas one at a time.

``watch`` samples memory, ``detector`` decides (pure), ``lease`` limits replacements.
"""

from cluster.leaks.detector import Growth
from cluster.leaks.lease import ReplacementLease
from cluster.leaks.watch import MemoryWatch

__all__ = ["Growth", "MemoryWatch", "ReplacementLease"]
