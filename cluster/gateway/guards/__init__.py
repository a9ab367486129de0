"""Guards: checks of prompts and answers by patterns and classifiers.

guards    selection of the guards of a request
checks    one guard: what it finds in texts
session   the guards of one request, from its prompt to its answer
window    one text of an answer between the engine and the client
answers   answers of the APIs, streamed or not, with their texts checked
formats   places of the texts in the events of each API, and events that end a blocked answer
"""

from cluster.gateway.guards.guards import REQUESTED_HEADER, Guards
from cluster.gateway.guards.session import GUARD_HEADER, GuardedRequest

__all__ = ["GUARD_HEADER", "REQUESTED_HEADER", "GuardedRequest", "Guards"]
