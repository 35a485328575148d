"""python -m experiments.gpu_speed: see experiments.gpu_kit.gpu_speed."""

import sys

from experiments.gpu_kit.gpu_speed import main

if __name__ == "__main__":
    sys.exit(main())
