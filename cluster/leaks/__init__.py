"""Memory leaks: which processes grow without end, and which replica may be replaced for it.

``slope`` and ``detector`` decide and are pure; ``watch`` samples; ``turns`` lets one replica of a
pool go at a time.
"""

from cluster.leaks.detector import Growth
from cluster.leaks.turns import Keys, Turns
from cluster.leaks.watch import MemoryWatch

__all__ = ["Growth", "Keys", "MemoryWatch", "Turns"]
