"""python -m experiments.figures: see uvm_kv.commands.figures."""

import sys

from uvm_kv.commands.figures import main

if __name__ == "__main__":
    sys.exit(main())
