"""Reports on a router's pools: gauges, the load for autoscaling, and the dashboard."""
