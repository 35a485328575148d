"""Speed of the CUDA extension on this machine's GPU, as ratios taken in one run: docs/microbench.md.

    python -m experiments.microbench [--parts attention copies ...] [--output DIR] [--quick] [--device 0] [--list]

Needs NumPy and the extension, nothing else; torch, CuPy and cuda.core are measured beside it where they are there.
"""
