"""Managed memory under NVIDIA's Unified-Memory driver: mechanism (block, driver, thrashing) and time (cost)."""
