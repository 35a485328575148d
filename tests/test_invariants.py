"""docs/invariants.md and the tests that it names; and those invariants that no other file holds."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from tests.helpers import REPOSITORY, drive, make_context, make_request, make_scheduler, make_sim
from tests.jobs import MECHANISMS, job
from uvm_kv.job.build import build_source, run_job, workload_of
from uvm_kv.kvcache.ops import MemoryCounters
from uvm_kv.sched.plan import StepOutput, StepPlan
from uvm_kv.sched.request import Request
from uvm_kv.store.directories import read_table
from uvm_kv.types import NS_PER_S

TEST = re.compile(r"`(tests/\S+\.py)::(test_\w+)`")
LATE_NS = 40_000_000
"""An arrival in the middle of what `early` requests take."""


def read_page() -> dict[str, tuple[str, list[str]]]:
    """Name of each invariant -> its sentence, and the lines of the list below it."""
    page = (REPOSITORY / "docs" / "invariants.md").read_text()
    found = {}
    for paragraph in page.split("\n\n"):
        if paragraph.startswith("**"):
            name, _, rest = paragraph[2:].partition("** ")
            sentence, *tests = rest.strip().split("\n- ")
            found[name.rstrip(".")] = " ".join(sentence.split()), tests
    return found


PAGE = read_page()


@pytest.mark.parametrize("name", PAGE)
def test_every_invariant_names_tests_that_exist(name: str) -> None:
    sentence, lines = PAGE[name]
    assert sentence.endswith(".") and ". " not in sentence, "an invariant is one sentence"
    assert lines, "no test holds it"
    for line in lines:
        match = TEST.fullmatch(line)
        assert match, f"{line}: it must be `tests/FILE.py::test_NAME`"
        tree = ast.parse((REPOSITORY / match[1]).read_text())
        assert match[2] in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}, line


def early() -> list[Request]:
    """Requests that wait for one another, and preempt."""
    return [make_request(i, 30 + 11 * i, 90 - 7 * i, 3_000_000 * i) for i in range(8)]


def serve(requests: list[Request]) -> list[tuple[StepPlan, StepOutput]]:
    context = make_context(12, 24, block_size=16)
    scheduler = make_scheduler(context, max_num_batched_tokens=48, admission="optimistic", preemption="swap")
    log = drive(scheduler, make_sim(context), requests)
    assert scheduler.num_swapped_out > 0
    return log


def test_the_times_of_a_request_are_in_order() -> None:
    requests = early()
    first = {sequence.request_id: output.timing.start_ns for plan, output in serve(requests)[::-1]
             for sequence in plan.scheduled}  # fmt: skip
    for request in requests:
        assert request.admitted_ns is not None and request.first_token_ns is not None and request.finish_ns is not None
        assert request.arrival_ns <= request.admitted_ns <= first[request.id] < request.first_token_ns
        assert request.first_token_ns < request.finish_ns


def test_a_later_arrival_changes_nothing_before_it() -> None:
    """Steps that began before the late requests arrived are the same without them; those that follow differ."""
    alone = serve(early())
    both = serve([*early(), *(make_request(8 + i, 40, 20, LATE_NS) for i in range(3))])
    before = [step for step in alone if step[1].timing.start_ns < LATE_NS]
    assert 10 < len(before) < len(alone)
    assert both[: len(before)] == before
    assert both[: len(alone)] != alone


@pytest.mark.parametrize("mechanism", ["pinned_swap", "pinned_balanced", "managed_demand"])
def test_reserved_bytes_are_used_or_lost_and_never_exceed_the_claim(mechanism: str, tmp_path: Path) -> None:
    """In every step; and the link bytes of the summary are those of its steps, cause by cause."""
    given = ("memory.device_kv_bytes=1073741824", "workload.prompt_tokens=128", "workload.output_tokens=128")
    one = job(tmp_path, f"mechanism={mechanism}", "batch_size=16", "workload.num_requests=32", *given)
    summary = run_job(one, argv=["test"])
    steps = read_table(one.directory, "steps")
    names = ("used", "lost_inside", "reserved", "claimed")
    for used, lost, reserved, claimed in zip(*(steps[f"kv_{name}_bytes"] for name in names), strict=True):
        assert used is not None and lost is not None and reserved is not None and claimed is not None
        assert min(used, lost) >= 0 and used + lost == reserved <= claimed
    causes = [name for name in MemoryCounters._fields if name.startswith(("h2d_", "d2h_"))]
    assert summary["link_bytes_by_cause"] == {name: sum(x or 0 for x in steps[name]) for name in causes}
    for way in ("h2d", "d2h"):
        assert summary[f"{way}_bytes"] == sum(summary["link_bytes_by_cause"][c] for c in causes if c.startswith(way))
    assert summary["h2d_bytes"] > 0


def test_mechanisms_that_share_a_draw_serve_the_same_requests(tmp_path: Path) -> None:
    """Lengths and arrivals, in every mechanism; another repeat draws others."""
    given = ("workload=azure_conv", "workload.num_requests=20", "workload.arrival=poisson", "workload.request_rate=2")

    def drawn(*overrides: str) -> list[tuple[int, int, int]]:
        one = job(tmp_path, *given, *overrides)
        arrived = build_source(one, workload_of(one)).arrivals(10**6 * NS_PER_S)
        return [(request.arrival_ns, request.prompt_tokens, request.output_tokens) for request in arrived]

    draws = [drawn(f"mechanism={mechanism}") for mechanism in MECHANISMS]
    assert len(draws[0]) == 20 and all(draw == draws[0] for draw in draws)
    assert drawn("first_repeat=1") != draws[0]
