"""Placement policies: where blocks live, and what is moved within a step. One file per policy."""
