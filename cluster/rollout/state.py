"""State of a rollout, which is stored in the cluster's GCS."""

from typing import Literal

import msgspec

from cluster.config import RolloutConfig
from cluster.rollout.figures import Totals

Phase = Literal["starting", "shadow", "canary", "promoted", "rolled_back", "cancelled"]
FINISHED = ("promoted", "rolled_back", "cancelled")
Action = Literal["pause", "resume", "abort"]
MAX_DECISIONS = 50


class RolloutDecision(msgspec.Struct, frozen=True):
    """One decision, with the figures that led to it."""

    time: float
    """Unix time."""
    decision: str
    reason: str


class RolloutState(msgspec.Struct, frozen=True):
    """A rollout between two decisions. Only the decider of the application writes it."""

    version: str
    model: str
    replicas: int
    """Replicas of the old version at the start."""
    room: int
    """Replicas of the new version for which the cluster had room beside them."""
    since: float
    """Unix time at which the phase or step began; again when the step got its share."""
    phase: Phase = "starting"
    step: int = 0
    share: float = 0.0
    """Percentage of the sessions that the new version gets now."""
    is_shadowed: bool = False
    """True if the new version answers copies of requests."""
    is_paused: bool = False
    needs_approval: bool = False
    """True if it is paused because a figure cannot be compared; a resumption approves that."""
    is_approved: bool = False
    """True if an operator accepts figures that cannot be compared."""
    old_replicas: int | None = None
    """Upper limit of the old version's replicas; None: as configured."""
    new_replicas: int = 0
    """Lower limit of the new version's replicas."""
    base: Totals = Totals()
    """Totals at ``since``."""
    window: Totals = Totals()
    """Figures since then."""
    checksum: str = ""
    """SHA-256 of the new version's weight files."""
    decisions: tuple[RolloutDecision, ...] = ()

    @property
    def is_finished(self) -> bool:
        """True if only the configuration has to be changed."""
        return self.phase in FINISHED

    def is_of(self, rule: RolloutConfig) -> bool:
        """Return True if this is the state of the configured rollout."""
        return (self.version, self.model) == (rule.version, rule.model)

    def cancel(self) -> "RolloutState":
        """Return the state after a deployment of a configuration without this rollout."""
        return msgspec.structs.replace(self, phase="cancelled", share=0.0, is_shadowed=False)

    def note(self, now: float, decision: str, reason: str) -> "RolloutState":
        """Return the state with one more decision."""
        noted = (*self.decisions, RolloutDecision(now, decision, reason))[-MAX_DECISIONS:]
        return msgspec.structs.replace(self, decisions=noted)
