"""Records of requests: metrics, traces, the request log, and usage."""
