"""docs/recipes.md is carried out: the files are written, the lines are added, and the commands do what it says."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers import REPOSITORY

PAGE = REPOSITORY / "docs" / "recipes.md"
BLOCK = re.compile(
    r"^<!-- (file|add|replace|commands|refused)(?:: (.*?))? -->\n```\w+\n(.*?)^```$", re.MULTILINE | re.DOTALL
)


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what the recipes touch and need. `python -m` in it runs its own code."""
    root = tmp_path_factory.mktemp("copy")
    for folder in ("uvm_kv", "experiments", "conf", "tests"):
        shutil.copytree(REPOSITORY / folder, root / folder, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    shutil.copy(REPOSITORY / "pyproject.toml", root)
    return root


def run(root: Path, command: str) -> subprocess.CompletedProcess[str]:
    words = shlex.split(command)
    assert words[0] == "python"
    return subprocess.run([sys.executable, *words[1:]], cwd=root, capture_output=True, text=True)


def carry_out(root: Path, kind: str, what: str, text: str) -> None:
    if kind == "file":
        assert not (root / what).exists(), "the recipe writes a new file"
        (root / what).write_text(text)
    elif kind in ("add", "replace"):
        path, _, anchor = what.partition(", below: " if kind == "add" else ", line: ")
        lines = (root / path).read_text().splitlines()
        assert lines.count(anchor) == 1, f"{path} holds this line once: {anchor}"
        at = lines.index(anchor)
        lines[at + (kind == "add") : at + 1] = text.splitlines()
        (root / path).write_text("\n".join(lines) + "\n")
    else:
        for command in text.splitlines():
            done = run(root, command)
            if kind == "commands":
                assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}{done.stderr[-2000:]}"
            else:
                assert done.returncode == 2 and what in done.stderr, f"{command}\n{done.stderr}"


def test_the_recipes(copy: Path) -> None:
    sections = PAGE.read_text().split("\n## ")[1:]
    assert len(sections) == 5
    for section in sections:
        found = BLOCK.findall(section)
        assert found and section.count("<!-- ") == len(found), "every block is understood"
        for kind, what, text in found:
            carry_out(copy, kind, what, text)
