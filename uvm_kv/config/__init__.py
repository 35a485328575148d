"""Typed config: schemas (Hydra), resolution to plain values with every check, and assembly of a job."""
