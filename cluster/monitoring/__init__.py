"""Monitoring of a deployment: Prometheus' configuration, rules, dashboards, stand-in for Grafana.

Knows metric names but no processes; ``cluster.launch`` starts Prometheus and Grafana.
"""
