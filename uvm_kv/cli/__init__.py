"""uvm-kv NAME key=value ...: every command but those of the kit for a GPU, each imported when it is asked for."""

from __future__ import annotations

import difflib
import sys
from importlib import import_module

COMMANDS = {
    "run": ("uvm_kv.commands.run", "run one job, or with -m a sweep of jobs and its report"),
    "advise": ("uvm_kv.cli.advise", "would CPU-backed KV help this card, model and workload? simulated"),
    "runs": ("uvm_kv.cli.runs", "list, filter and show finished runs"),
    "report": ("uvm_kv.commands.report", "verdict, tables, figure and HTML page of the runs below a folder"),
    "figures": ("uvm_kv.commands.figures", "figures and tables of the study, from finished runs"),
    "study": ("uvm_kv.commands.study", "run the study again and compare it with the reference set"),
    "roofline": ("uvm_kv.commands.roofline", "one step of a model, operator by operator"),
    "replay": ("uvm_kv.commands.uvm_replay", "a published study of Unified Memory on the driver model"),
    "calibrate": ("uvm_kv.commands.calibrate", "from measured curves to the profile of a card"),
    "validate": ("uvm_kv.commands.validate", "compare the simulator with recorded runs"),
    "validate-sweep": ("uvm_kv.commands.validate_sweep", "compare a measured sweep with its predictions"),
    "publish": ("uvm_kv.tracking.publish", "finished runs to wandb"),
    "dashboard": ("uvm_kv.tracking.dashboard", "saved views and a report on wandb"),
    "bench": ("uvm_kv.commands.bench", "speed of the simulator and the engine"),
    "bench-model": ("uvm_kv.commands.bench_model", "speed of a real model on the CPU"),
    "rekey": ("uvm_kv.commands.rekey", "give runs of an older version the run ids of this one"),
    "doctor": ("uvm_kv.cli.doctor", "what this machine has, and what works because of it"),
}
"""Each: the module whose `main` it is, and what it does. pandas and matplotlib take a second that --help need not wait
for."""

RAISING = ("advise", "runs", "report", "doctor")
"""Their mistakes are told here. The others tell their own, so that what they raise is a fault of ours."""


def main(argv: list[str] | None = None) -> int:
    """Exit status: the command's, 2 for a mistake, 130 when interrupted."""
    argv = sys.argv[1:] if argv is None else argv
    name, rest = (argv[0], argv[1:]) if argv else ("", [])
    if name in ("-h", "--help"):
        print("usage: uvm-kv NAME [key=value ...] [--json]\n       uvm-kv NAME --help\n")
        print("\n".join(f"  {command:<16}{about}" for command, (_, about) in COMMANDS.items()))
        return 0
    if name == "--version":
        from uvm_kv import __version__

        print(f"uvm-kv {__version__}")
        return 0
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, n=1)
        given = f"{name} is no command; " if name else "give a command; "
        hint = f"did you mean {near[0]}? " if near else ""
        print(f"error: {given}{hint}there are {', '.join(COMMANDS)}", file=sys.stderr)
        return 2
    before = sys.argv
    sys.argv = [f"uvm-kv {name}", *rest]  # Hydra reads it there, and so do all of them.
    try:
        status: int = import_module(COMMANDS[name][0]).main()
        return status
    except (ValueError, OSError) as error:
        if name not in RAISING:
            raise
        from uvm_kv.store.checks import visible

        print(f"error: {visible(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    finally:
        sys.argv = before
