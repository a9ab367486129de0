"""Choice of the model that answers: `model: auto`, and fallbacks."""

from cluster.gateway.choice.auto import CHOICE_HEADER, AutoChoice
from cluster.gateway.choice.fallbacks import FALLBACK_HEADER, Fallbacks

__all__ = ["CHOICE_HEADER", "FALLBACK_HEADER", "AutoChoice", "Fallbacks"]
