"""Traces, length distributions and arrival processes. All randomness comes from one seed."""
