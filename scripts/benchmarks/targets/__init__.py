"""Servers under test, each a context manager that starts one and yields a ``RunningTarget``."""
