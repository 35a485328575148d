"""python -m experiments.validate: see uvm_kv.commands.validate."""

import sys

from uvm_kv.commands.validate import main

if __name__ == "__main__":
    sys.exit(main())
