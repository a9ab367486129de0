"""Fault injection and soak tests: a cluster under load, and what its clients see.

accounting     answers of the load to results: failures, recovery, targets; pure
load, job      the clients: streams, classifications, a slow reader, a Ray job
testbed        the cluster under test: its processes, replicas and updates
faults         the faults that can be injected
inside         code that runs in the cluster's processes and obeys the control file
chaos          ``./scripts/chaos``
growth         growth of memory, descriptors, threads, tasks and series; pure
soak           ``./scripts/soak``
"""
