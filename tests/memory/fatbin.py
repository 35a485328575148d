"""Which architectures a binary holds, read from its CUDA fat binaries: cuobjdump is not in the wheels that build it."""

from __future__ import annotations

import struct
from pathlib import Path

MAGIC = 0xBA55ED50
PTX, ELF = 1, 2


def architectures(binary: Path) -> set[str]:
    """`sm_86` for machine code, `compute_86` for PTX.

    A fat binary is a header (magic u32, version u16, header bytes u16, body bytes u64) and entries, each with a header
    (kind u16, version u16, header bytes u32, payload bytes u64, ..., architecture u32 at byte 28) before its payload.
    """
    data = binary.read_bytes()
    found: set[str] = set()
    at = data.find(struct.pack("<I", MAGIC))
    while at >= 0:
        version, header, body = struct.unpack_from("<HHQ", data, at + 4)
        if version == 1 and header == 16 and at + header + body <= len(data):
            found |= _entries(data, at + header, at + header + body)
        at = data.find(struct.pack("<I", MAGIC), at + 4)
    return found


def _entries(data: bytes, at: int, end: int) -> set[str]:
    found = set()
    while at + 32 <= end:
        kind, _, header, payload = struct.unpack_from("<HHIQ", data, at)
        (arch,) = struct.unpack_from("<I", data, at + 28)
        if kind not in (PTX, ELF) or header < 32:
            break
        found.add(f"{'sm' if kind == ELF else 'compute'}_{arch}")
        at += header + payload
    return found
