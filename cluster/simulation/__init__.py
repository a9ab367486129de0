"""Discrete-event simulator of one pool: routers with their queues, replicas, autoscaling.

Runs the live system's policies (``cluster.routing``, ``cluster.admission``,
``cluster.autoscaling``) on traces of requests, in simulated time. No Ray, no clock, no network.
Modules:

requests       requests of a trace, and their state in a simulation
traces         built-in traces by name; uses arrivals (times) and workloads (prompts)
trace_files    traces from files
settings       settings of a simulation
simulator      the simulation: arrivals, scaling, faults, and what is measured
router         one router: policy, fleet, prefix index and queue of the live system
replica        one replica, which drives its engine_model (continuous batching)
signals        signals for autoscaling
result         result, with percentiles from histogram; plot draws it
"""
