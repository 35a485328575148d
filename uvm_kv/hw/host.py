"""Free memory of this machine, read anew at every call."""

from __future__ import annotations

import re
from pathlib import Path


def available_host_bytes(meminfo: Path = Path("/proc/meminfo")) -> int | None:
    """Bytes that the system can give without swapping, cached files included; None where it does not say."""
    try:
        found = re.search(r"^MemAvailable:\s+(\d+) kB", meminfo.read_text(), re.MULTILINE)
    except OSError:
        return None
    return int(found[1]) * 1024 if found else None
