"""python -m experiments.measure: see experiments.gpu_kit.gpu_check."""

import sys

from experiments.gpu_kit.gpu_check import main

if __name__ == "__main__":
    sys.exit(main(own=True))
