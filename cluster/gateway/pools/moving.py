"""Answers of replicas that drain or hang move to other replicas, one after the other."""

import asyncio
import logging

from cluster.errors import RequestError
from cluster.gateway.pools.queue import AdmissionQueue
from cluster.gateway.pools.replica import Movable, Replica

logger = logging.getLogger("ray.serve.tandem")

RETRY_S = 1.0
"""Time after which a slot is asked for again if there was none."""


async def move_answers(replica: Replica, queue: AdmissionQueue) -> None:
    """Move the answers that other replicas can continue, each as soon as there is a slot for it.

    An answer stays at its replica until it has a slot at another one. A request without any answer
    is sent again once a slot is free: it waits before all others, but the slot is not kept for it.
    """
    reason = "drains" if replica.is_draining else "is silent"
    logger.info("replica %s %s: %d answers move", replica.info.id, reason, len(replica.movable))
    tried: set[Movable] = set()
    # On a draining node, answers may begin here while there is no other replica.
    while rest := replica.movable - tried:
        answer = rest.pop()
        tried.add(answer)
        while (claim := answer.move_claim()) is not None:
            try:
                slot = await queue.take_slot(claim)
            except RequestError:
                await asyncio.sleep(RETRY_S)
                continue
            if not answer.move_to(slot):
                queue.release_slot(slot)
