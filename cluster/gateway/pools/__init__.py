"""Pools of replicas: selection by model and path, queue, choice of a replica, relay."""
