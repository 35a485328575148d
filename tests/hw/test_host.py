"""Free memory of this machine: what the kernel says, or that it does not."""

from __future__ import annotations

from pathlib import Path

from uvm_kv.hw.host import available_host_bytes


def test_available_memory_is_what_the_kernel_says(tmp_path: Path) -> None:
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal:  100 kB\nMemAvailable:  40 kB\n")
    assert available_host_bytes(meminfo) == 40 * 1024


def test_what_the_system_does_not_say_is_none(tmp_path: Path) -> None:
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal:  100 kB\n")
    assert available_host_bytes(meminfo) is None
    assert available_host_bytes(tmp_path / "none") is None
