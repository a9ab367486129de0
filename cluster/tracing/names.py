"""Names of spans and attributes, from OpenTelemetry's conventions for HTTP and GenAI.

The GenAI conventions are experimental, so they appear in this module only.
"""

from typing import Final

METHOD: Final = "http.request.method"
ROUTE: Final = "http.route"
STATUS: Final = "http.response.status_code"
ERROR_TYPE: Final = "error.type"
SERVER_ADDRESS: Final = "server.address"
SERVER_PORT: Final = "server.port"

OPERATION: Final = "gen_ai.operation.name"
PROVIDER: Final = "gen_ai.provider.name"
REQUEST_MODEL: Final = "gen_ai.request.model"
INPUT_TOKENS: Final = "gen_ai.usage.input_tokens"
CACHED_TOKENS: Final = "gen_ai.usage.cache_read.input_tokens"
OUTPUT_TOKENS: Final = "gen_ai.usage.output_tokens"
FIRST_CHUNK: Final = "gen_ai.response.time_to_first_chunk"

REQUEST_ID: Final = "tandem.request_id"
TENANT: Final = "tandem.tenant"
QUEUE: Final = "tandem.queue_s"
REPLICA: Final = "tandem.replica"
LINK_WAY: Final = "tandem.link.way"
ATTEMPT: Final = "tandem.attempt"

_OPERATIONS = {
    "/v1/chat/completions": "chat",
    "/v1/messages": "chat",
    "/v1/responses": "chat",
    "/v1/completions": "text_completion",
    "/v1/embeddings": "embeddings",
}


def operation_of(route: str) -> str:
    """Return the GenAI operation of a route; by default, the route's last fixed segment."""
    known = _OPERATIONS.get(route)
    parts = [part for part in route.split("/") if part and not part.startswith("{")]
    return known or (parts[-1] if parts else route)
