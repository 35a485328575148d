"""python -m experiments.roofline: see uvm_kv.commands.roofline."""

import sys

from uvm_kv.commands.roofline import main

if __name__ == "__main__":
    sys.exit(main())
