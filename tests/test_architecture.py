"""Rules of the codebase that lint does not see."""

from __future__ import annotations

import re

from tests.helpers import REPOSITORY

PAGES = [REPOSITORY / "README.md", REPOSITORY / "CONTRIBUTING.md", REPOSITORY / "results" / "README.md"]
PAGES += sorted((REPOSITORY / "docs").glob("*.md"))
CORE = ("kvcache", "sched", "placement", "engine")


def test_the_plain_core_stays_small() -> None:
    """About 1,500 lines: an engine that reads in an hour."""
    files = [file for room in CORE for file in (REPOSITORY / "uvm_kv" / room).rglob("*.py")]
    assert sum(len(file.read_text().splitlines()) for file in files) < 1700


def test_every_module_says_what_it_is_for() -> None:
    for folder in ("uvm_kv", "experiments", "tests"):
        for file in (REPOSITORY / folder).rglob("*.py"):
            text = file.read_text()
            assert not text or text.startswith('"""'), file


def test_placement_policies_stay_short() -> None:
    for file in (REPOSITORY / "uvm_kv" / "placement").glob("*.py"):
        if file.stem not in ("__init__", "base", "registry"):
            assert len(file.read_text().splitlines()) <= 150, file


def test_files_and_modules_that_the_docs_name_exist() -> None:
    """What is committed, not what commands write; a link is relative to its page."""
    for page in PAGES:
        text = page.read_text()
        paths = re.findall(r"`((?:uvm_kv|experiments|tests|cuda_ext|conf/\w+|docs)/[\w./]+)`", text)
        links = [str(page.parent / link) for link in re.findall(r"\]\((?!http)([^)#]+)", text)]
        modules = [name.replace(".", "/") for name in re.findall(r"`((?:uvm_kv|tests)(?:\.[a-z]\w*)+)`", text)]
        found = [*paths, *links, *(f"{name}.py" for name in modules if not (REPOSITORY / name).is_dir())]
        missing = [name for name in found if not (REPOSITORY / name).exists() and "my_3090" not in name]
        # A module may be named with something in it: uvm_kv.hw.overlap.ceiling.
        assert [n for n in missing if not (REPOSITORY / n).parent.with_suffix(".py").exists()] == [], page
