"""What a part found: one JSON file, written anew after every case, and its tables in text."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.gpu_kit.microbench.stats import Summary, summary, verdict

FORMAT = "uvm-kv microbench"
SCHEMA_VERSION = 1
OK, NOT_RUN, FAILED = "ok", "not run", "failed"
COMPLETE, STOPPED = "complete", "stopped"
"""States of a part. A complete part came to its end, whatever became of its cases."""


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(path.suffix + ".partial")
    partial.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n")
    partial.replace(path)


def read_part(path: Path) -> dict[str, Any] | None:
    """None where there is no such file, or it is not one of ours."""
    try:
        raw = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    is_ours = isinstance(raw, dict) and raw.get("format") == FORMAT and raw.get("schema_version") == SCHEMA_VERSION
    return raw if is_ours else None


def is_kept(raw: Mapping[str, Any] | None, settings: Mapping[str, Any]) -> bool:
    """Taken to its end with these settings, nothing failed, so that it need not be taken again."""
    if raw is None or raw["status"] != COMPLETE or raw["settings"] != dict(settings):
        return False
    return all(case["status"] != FAILED for case in raw["cases"]) and not raw["out_of_time"]


class PartRecord:
    def __init__(self, path: Path, part: str, settings: Mapping[str, Any], started: str) -> None:
        self._path = path
        self.content: dict[str, Any] = {
            "format": FORMAT,
            "schema_version": SCHEMA_VERSION,
            "part": part,
            "status": STOPPED,
            "out_of_time": False,
            "settings": dict(settings),
            "started": started,
            "duration_s": None,
            "cases": [],
            "ratios": [],
            "curves": {},
            "notes": [],
        }
        self.save()

    def save(self) -> None:
        write_json(self._path, self.content)

    def case(
        self,
        name: str,
        *,
        num_bytes: int,
        seconds: Sequence[float],
        predicted_gb_per_s: float | None = None,
        **more: Any,
    ) -> list[float]:
        """A measured case; the rates of its repeats in bytes per second. `more` is recorded as it is."""
        found = summary(seconds)
        rate = num_bytes / found.median / 1e9
        spread = None if found.spread is None else round(found.spread, 5)
        self.content["cases"].append(
            {
                "name": name,
                "status": OK,
                "bytes": num_bytes,
                "seconds": [float(s) for s in seconds],
                "median_us": round(found.median * 1e6, 3),
                "gb_per_s": round(rate, 4),
                "spread": spread,
                "predicted_gb_per_s": None if predicted_gb_per_s is None else round(predicted_gb_per_s, 3),
                **more,
            }
        )
        self.save()
        return [num_bytes / s for s in seconds]

    def without(self, name: str, status: str, why: str) -> None:
        """A case that was not run, or failed, and why, in a line."""
        line = " ".join(why.split())[:400] or "no reason given"
        self.content["cases"].append({"name": name, "status": status, "why": line})
        self.save()

    def ratio(self, name: str, values: Sequence[float], target: float | None = None, of: str = "") -> Summary:
        """`of`: what was divided by what."""
        found = summary(values)
        self.content["ratios"].append(
            {
                "name": name,
                "of": of,
                "values": [round(float(v), 5) for v in values],
                "median": round(found.median, 4),
                "spread": None if found.spread is None else round(found.spread, 5),
                "target": target,
                "verdict": verdict(found, target),
            }
        )
        self.save()
        return found

    def note(self, text: str) -> None:
        if text not in self.content["notes"]:
            self.content["notes"].append(text)
            self.save()

    def point(self, curve: str, at: Mapping[str, Any], seconds: Sequence[float]) -> None:
        """A point of the curves file."""
        self.content["curves"].setdefault(curve, []).append({**at, "seconds": [float(s) for s in seconds]})
        self.save()

    def finish(self, duration_s: float) -> None:
        self.content["status"] = COMPLETE
        self.content["duration_s"] = round(duration_s, 3)
        self.save()


def text_table(columns: Sequence[str], rows: Iterable[Sequence[str]], num_left: int = 1) -> list[str]:
    """Lines; the first `num_left` columns to the left, the others to the right."""
    cells = [list(columns), *(list(row) for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(columns))]
    lines = []
    for row in cells:
        sized = [c.ljust(w) if i < num_left else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))]
        lines.append("  ".join(sized).rstrip())
    lines.insert(1, "  ".join("-" * width for width in widths))
    return lines


def _number(value: float | None, digits: int = 1) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"


def _case_row(case: Mapping[str, Any]) -> list[str]:
    predicted, rate = case["predicted_gb_per_s"], case["gb_per_s"]
    share = None if not predicted else rate / predicted
    head = [case["name"], _number(case["median_us"]), _number(rate, 2), percent(case["spread"])]
    return [*head, _number(predicted, 2), _number(share, 2)]


def part_lines(content: Mapping[str, Any]) -> list[str]:
    """The tables of a part."""
    took = "" if content["duration_s"] is None else f", {content['duration_s']:.0f} s"
    lines = [f"== {content['part']} ({content['status']}{took})"]
    taken = [case for case in content["cases"] if case["status"] == OK]
    if taken:
        columns = ("case", "us", "GB/s", "spread", "predicted", "of it")
        lines += text_table(columns, [_case_row(case) for case in taken])
    if content["ratios"]:
        lines.append("")
        rows = [
            [r["name"], _number(r["median"], 3), percent(r["spread"]), _number(r["target"], 2), r["verdict"]]
            for r in content["ratios"]
        ]
        lines += text_table(("ratio", "median", "spread", "target", "verdict"), rows)
    missing = [case for case in content["cases"] if case["status"] != OK]
    lines += [f"{case['status']}: {case['name']}: {case['why']}" for case in missing]
    lines += [f"note: {note}" for note in content["notes"]]
    return [*lines, ""]
