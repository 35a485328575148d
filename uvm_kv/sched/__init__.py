"""Requests, step plans and the scheduler. Deterministic; time comes in as an argument."""
