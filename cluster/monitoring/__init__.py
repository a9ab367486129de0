"""Monitoring files of a deployment: Prometheus' configuration and rules, Grafana's dashboards.

Knows metric names but no processes; ``cluster.launch`` starts Prometheus.
"""
