"""python -m experiments.study: see uvm_kv.commands.study."""

import sys

from uvm_kv.commands.study import main

if __name__ == "__main__":
    sys.exit(main())
