"""Requests to a classifier: HTTP, tasks, result cache, queue, and the threads that compute."""
