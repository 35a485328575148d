"""Simulated runs against recorded ones."""
