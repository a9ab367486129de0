"""The servers that are measured: each a context manager that yields where it answers."""
