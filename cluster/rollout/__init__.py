"""Rollouts: figures of two versions of a model, their comparison, and the next step. Pure.

``figures`` counts, ``judge`` compares, ``decider`` decides, ``split`` divides the requests.
"""

from cluster.rollout.decider import Observation, decide, plan
from cluster.rollout.figures import Figures, Totals
from cluster.rollout.judge import UNLABELED, Verdict, judge
from cluster.rollout.split import takes_candidate
from cluster.rollout.state import FINISHED, Action, RolloutDecision, RolloutState

__all__ = [
    "FINISHED",
    "UNLABELED",
    "Action",
    "Figures",
    "Observation",
    "RolloutDecision",
    "RolloutState",
    "Totals",
    "Verdict",
    "decide",
    "judge",
    "plan",
    "takes_candidate",
]
