"""The autoscaling policy of the pools, as Ray Serve calls it."""

from typing import Any

from ray.serve.config import AutoscalingContext

from cluster.autoscaling import replicas_for

ONGOING = "ongoing"
"""The name under which a replica reports its requests (``record_autoscaling_stats``)."""


def by_reported_ongoing(context: AutoscalingContext) -> tuple[int, dict[str, Any]]:
    """Replicas for the requests that the pool's replicas say they are serving.

    Serve counts requests that come through its handles; those over a link it cannot see. While
    no replica has reported, the target stays.
    """
    reported = (context.aggregated_metrics or {}).get(ONGOING, {})
    if not reported:
        return context.target_num_replicas, {}
    target = context.config.get_target_ongoing_requests()
    return replicas_for(sum(reported.values()), target), {}
