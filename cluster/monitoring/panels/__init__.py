"""Stand-in for Grafana: a read-only server of the panels that Ray's dashboard embeds.

``python -m cluster.monitoring.panels`` runs it. It reads Grafana's dashboards as JSON, runs their
queries against one Prometheus and draws the results in the browser. It accepts no PromQL from
outside: a request names a panel, and values of its variables, which are escaped.
"""
