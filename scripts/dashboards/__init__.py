"""Grafana's dashboards and alerts as code: ``python -m dashboards`` writes them for Grafana."""
