"""What watches a deployment from outside: Prometheus' configuration, its rules, the dashboards.

Knows the names of the metrics and nothing of the processes; ``cluster.launch`` starts those.
"""
