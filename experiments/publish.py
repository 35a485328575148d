"""python -m experiments.publish: see uvm_kv.tracking.publish."""

import sys

from uvm_kv.tracking.publish import main

if __name__ == "__main__":
    sys.exit(main())
