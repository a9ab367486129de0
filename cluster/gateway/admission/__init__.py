"""Admission of a request: API key, tenant quotas, and its claim on a pool."""
