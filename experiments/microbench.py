"""python -m experiments.microbench: see experiments.gpu_kit.microbench.cli."""

import sys

from experiments.gpu_kit.microbench.cli import main

if __name__ == "__main__":
    sys.exit(main())
