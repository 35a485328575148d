"""python -m experiments.dashboard: see uvm_kv.tracking.dashboard."""

import sys

from uvm_kv.tracking.dashboard import main

if __name__ == "__main__":
    sys.exit(main())
