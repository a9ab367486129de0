"""OpenAI's files and batches (ADR 17): the HTTP paths, and the run of the lines.

routes    handlers of ``/v1/files`` and ``/v1/batches``
uploads   reading of an uploaded file, to disk
service   the router's part: it runs all open batches while it has the lease
runner    one batch: validation, its lines, and its files
answers   one attempt of a line: its answer, or the error, and how often to repeat it
spare     slots of a pool for lines, as far as other requests leave room
"""

from cluster.gateway.batches.routes import FILES_PATH, BatchRoutes
from cluster.gateway.batches.service import BatchBackend, BatchService

__all__ = ["FILES_PATH", "BatchBackend", "BatchRoutes", "BatchService"]
