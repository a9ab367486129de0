"""Paths that the router answers itself: health, models, OpenAPI, metrics, usage and HTML pages."""
