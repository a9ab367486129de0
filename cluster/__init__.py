"""Tandem: generators and classifiers behind one autoscaling router, on one Ray cluster."""

from importlib.metadata import version

__version__ = version("tandem")
