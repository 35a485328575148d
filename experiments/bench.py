"""python -m experiments.bench: see uvm_kv.commands.bench."""

import sys

from uvm_kv.commands.bench import main

if __name__ == "__main__":
    sys.exit(main())
