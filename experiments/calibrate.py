"""python -m experiments.calibrate: see uvm_kv.commands.calibrate."""

import sys

from uvm_kv.commands.calibrate import main

if __name__ == "__main__":
    sys.exit(main())
