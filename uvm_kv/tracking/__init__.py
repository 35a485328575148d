"""Mirrors of runs and reports in wandb."""
