"""What README says of the results is what the reference set says."""

from __future__ import annotations

import shutil
import textwrap
from pathlib import Path

from tests.helpers import REPOSITORY
from uvm_kv.commands.figures import REFERENCE, make
from uvm_kv.study import STUDIES
from uvm_kv.study.page import LEADING, answer

CONF_DIR = REPOSITORY / "conf" / "experiment"
BEGIN, END = "<!-- answer -->\n", "<!-- /answer -->"


def quoted(sentences: list[str]) -> str:
    return "".join(
        "\n".join(textwrap.wrap(line, 120, initial_indent="- ", subsequent_indent="  ", break_on_hyphens=False)) + "\n"
        for line in sentences
    )


def test_the_answer_in_readme_is_computed_from_the_reference(tmp_path: Path) -> None:
    published = [make(name, REFERENCE, tmp_path, REFERENCE) for name in LEADING]
    assert not any(it.unknown for it in published)
    text = (REPOSITORY / "README.md").read_text()
    assert text.partition(BEGIN)[2].partition(END)[0] == quoted(answer(published))


def test_readme_names_the_experiments_of_every_figure() -> None:
    text = (REPOSITORY / "README.md").read_text()
    named = text[text.index("Each figure answers one question") : text.index("Each figure is written as PDF")]
    for study in STUDIES.values():
        for source in study.sources:
            assert f"`{source}`" in named, f"{study.name} draws on {source}"
    computed = [
        source for it in STUDIES.values() for source in it.sources if not (CONF_DIR / f"{source}.yaml").is_file()
    ]
    assert computed == ["roofline"] and "`roofline` is computed" in named


def test_the_phase_diagram_in_docs_is_the_reference_s(tmp_path: Path) -> None:
    make("phase_diagram", REFERENCE, tmp_path, REFERENCE)
    assert shutil.which("git") and (tmp_path / "phase_diagram.csv").read_bytes()
    assert (REPOSITORY / "docs" / "phase_diagram.csv").read_bytes() == (tmp_path / "phase_diagram.csv").read_bytes()
