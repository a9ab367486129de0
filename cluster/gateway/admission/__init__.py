"""Admission of requests: API keys, quotas of tenants, and the exchange of quotas among routers."""
