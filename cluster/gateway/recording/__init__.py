"""Records of single requests: metrics, traces, the request log, and usage."""
