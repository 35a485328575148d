"""python -m experiments.measure: see experiments.gpu_kit.measure."""

import sys

from experiments.gpu_kit.measure import main

if __name__ == "__main__":
    sys.exit(main())
