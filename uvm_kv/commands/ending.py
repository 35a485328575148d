"""How a small command ends that cannot do what it was asked."""

from __future__ import annotations

import sys

from uvm_kv.store.checks import visible


def say_why(error: Exception) -> int:
    """A line on stderr; the exit status: 2 for a mistake in what was given, 1 for what the system did not allow."""
    if isinstance(error, OSError):
        where = "" if error.filename is None else f"{error.filename}: "
        print(f"error: {visible(where)}{error.strerror or error}", file=sys.stderr)
        return 1
    print(f"error: {visible(str(error).splitlines()[0])}", file=sys.stderr)
    return 2
