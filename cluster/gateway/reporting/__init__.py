"""Reports on the state of pools: gauges, load reports for autoscaling, and the dashboard."""
