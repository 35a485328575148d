"""python -m experiments.run: see uvm_kv.commands.run."""

import sys

from uvm_kv.commands.run import main

if __name__ == "__main__":
    sys.exit(main())
