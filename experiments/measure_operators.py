"""python -m experiments.measure_operators: see experiments.gpu_kit.measure_operators."""

import sys

from experiments.gpu_kit.measure_operators import main

if __name__ == "__main__":
    sys.exit(main())
