"""Files and batches: a request per line of a file, run at the lowest priority. No network.

types     files, batches and their JSON forms in OpenAI's API
lines     reading and validation of a batch's lines, and the lines of its results
store     SQLite database of files, batches, results, and the lease of the router that runs them
"""

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
    "StoredFile",
    "check_lines",
    "error_line",
    "model_of",
    "new_id",
    "parse_line",
    "result_line",
]
