"""Paths that the router answers itself."""
