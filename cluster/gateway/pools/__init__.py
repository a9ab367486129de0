"""Pools of replicas. A request passes ``selection``, ``queue``, ``replica_set`` and ``relay``.

``factory`` builds the pools from the configuration; ``slots`` has the types that the queue and the
replica set exchange.
"""
