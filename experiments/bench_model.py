"""python -m experiments.bench_model: see uvm_kv.commands.bench_model."""

import sys

from uvm_kv.commands.bench_model import main

if __name__ == "__main__":
    sys.exit(main())
