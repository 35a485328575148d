"""python -m experiments.validate_sweep: see uvm_kv.commands.validate_sweep."""

import sys

from uvm_kv.commands.validate_sweep import main

if __name__ == "__main__":
    sys.exit(main())
