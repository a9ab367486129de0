"""A discrete-event simulator of one pool: routers, their queue, replicas, autoscaling.

Runs the policies of the live system (``cluster.routing``, ``cluster.admission``,
``cluster.autoscaling``) on traces of requests; time is an event's. No Ray, no clock, no network.
"""
