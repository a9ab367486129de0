"""The servers that are measured: each a context manager that yields where it answers."""

from benchmarks.targets.home import Endpoint, Home, TargetError

__all__ = ["Endpoint", "Home", "TargetError"]
