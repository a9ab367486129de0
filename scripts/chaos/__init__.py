"""Fault injection: kill parts of a running cluster under load and measure what clients see.

``accounting`` turns requests into results and is independent of a cluster. ``target`` finds and
kills processes, ``load`` and ``job`` send requests.
"""
