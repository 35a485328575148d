"""python -m experiments.profile: see experiments.gpu_kit.profile."""

import sys

from experiments.gpu_kit.profile import main

if __name__ == "__main__":
    sys.exit(main())
