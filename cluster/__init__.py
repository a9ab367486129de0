"""Tandem: one Ray cluster that serves generators and classifiers behind one autoscaling router."""

from importlib.metadata import version

__version__ = version("tandem")
