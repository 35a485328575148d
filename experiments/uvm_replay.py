"""python -m experiments.uvm_replay: see uvm_kv.commands.uvm_replay."""

import sys

from uvm_kv.commands.uvm_replay import main

if __name__ == "__main__":
    sys.exit(main())
