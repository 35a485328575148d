"""Where the files lie that come with the package, and which copy of the package runs."""

from __future__ import annotations

from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1]
INSTALLED = PACKAGE / "shipped"
"""The wheel has `conf` and `results/reference` in here (pyproject.toml); a checkout has them beside the package."""


def in_wheel() -> bool:
    """Whether the package was installed from a wheel, so that nobody edits its files."""
    return INSTALLED.is_dir()


def shipped(name: str) -> Path:
    """A folder by its path in the repository, such as `conf` or `results/reference`, in a checkout or a wheel."""
    return (INSTALLED if in_wheel() else PACKAGE.parent) / name


def command(name: str) -> list[str]:
    """How a user starts the command `name`: a wheel has no entry points of a checkout."""
    return ["uvm-kv", name] if in_wheel() else ["python", "-m", f"experiments.{name}"]


def another_copy() -> str | None:
    """A line to print where the current folder holds another uvm_kv than the one that runs; None where it does not."""
    here = Path.cwd() / "uvm_kv"
    if not (here / "__init__.py").is_file() or here.resolve() == PACKAGE:
        return None
    return f"this runs {PACKAGE}, not the uvm_kv of the current folder; python -m experiments.NAME runs that one"
