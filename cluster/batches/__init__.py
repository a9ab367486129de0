"""Files and batches: a request per line of a file, run at the lowest priority. No network.

types     files, batches and their JSON forms in OpenAI's API
lines     reading and validation of a batch's lines, and the lines of its results
store     files, batches, results, and the lease of the router that runs them, in a database
database  interface of the databases
sqlite    database in a directory, of the routers of one node
postgres  database of the routers of several nodes; imported only if it is configured
"""

from cluster.batches.database import StoreError
from cluster.batches.lines import (
    BatchLine,
    LineReader,
    LineResult,
    check_lines,
    error_line,
    model_of,
    parse_line,
    result_line,
)
from cluster.batches.opening import open_store
from cluster.batches.store import BatchStore, Listing
from cluster.batches.types import (
    ENDPOINTS,
    FINAL,
    Batch,
    LineError,
    StoredFile,
    new_id,
)

__all__ = [
    "ENDPOINTS",
    "FINAL",
    "Batch",
    "BatchLine",
    "BatchStore",
    "LineError",
    "LineReader",
    "LineResult",
    "Listing",
    "StoreError",
    "StoredFile",
    "check_lines",
    "error_line",
    "model_of",
    "new_id",
    "open_store",
    "parse_line",
    "result_line",
]
