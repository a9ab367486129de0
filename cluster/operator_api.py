"""Paths and messages of the router's API for operators, shared with the command line."""

from collections.abc import Sequence

KEYS_PATH = "/v1/keys"
KEY_PATH = "/v1/keys/{key_id}"
LOGS_PATH = "/v1/logs"


def describe_missing_request(request_id: str, logs: str, problems: Sequence[str] = ()) -> str:
    """Return the error for a request without log entries; logs with problems may have some."""
    unread = f" Not all logs were read: {'; '.join(problems)}." if problems else ""
    return (
        f"Request id {request_id!r} not found in {logs}. Routers log a sample above "
        f"router.log_requests_per_s.{unread}"
    )
