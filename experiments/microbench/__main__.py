"""python -m experiments.microbench"""

from __future__ import annotations

import sys

from experiments.microbench.cli import main

if __name__ == "__main__":
    sys.exit(main())
