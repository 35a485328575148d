"""python -m experiments.rekey: see uvm_kv.commands.rekey."""

import sys

from uvm_kv.commands.rekey import main

if __name__ == "__main__":
    sys.exit(main())
