"""python -m uvm_kv.cli, for a checkout that is not installed."""

import sys

from uvm_kv.cli import main

sys.exit(main())
