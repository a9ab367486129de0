"""Placement of an application's replicas on nodes, by their logical resources."""

from cluster.config import TandemConfig

Resources = dict[str, float]


def replica_demands(config: TandemConfig, count: str) -> list[Resources]:
    """Return what each replica needs on one node, for ``count`` (min or max) replicas."""
    demands = []
    for part in (config.router, *config.classifiers, *config.generators):
        workers, resources = part.num_workers, part.resources
        amounts = {"CPU": resources.cpus, "GPU": resources.gpus, **resources.custom}
        demand = {name: workers * amount for name, amount in amounts.items() if amount}
        demands += [demand] * getattr(part.replicas, count)
    return demands


def place_all(demands: list[Resources], nodes: list[Resources]) -> None:
    """Place the largest demands first, on the smallest nodes; fail if one fits on no node."""
    for demand in sorted(demands, key=lambda demand: (-len(demand), -sum(demand.values()))):
        fitting = [
            node
            for node in nodes
            if all(node.get(name, 0) >= amount for name, amount in demand.items())
        ]
        assert fitting, (demand, nodes)
        node = min(fitting, key=lambda node: (node.get("GPU", 0), node["CPU"]))
        for name, amount in demand.items():
            node[name] -= amount
