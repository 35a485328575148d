"""Traces, length distributions and arrival processes. All randomness comes from the seed and the repeat."""
