"""Measured curves of one machine, the input of a calibration: what a curves file holds, reading one, what to measure.

A file is one JSON object, explained field by field in docs/calibration.md. A curve is a list of points; a point is
where it was taken (its coordinates) and the seconds of every repeat. Errors are ValueErrors of a line.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from datetime import date
from pathlib import Path
from statistics import median
from typing import Any

from uvm_kv.config.names import unknown
from uvm_kv.hw.counting import Precision, attention_work, embedding_work, head_work, operator_work
from uvm_kv.hw.model import ModelGeometry
from uvm_kv.runner.sim.uvm.block import Prefetcher
from uvm_kv.runner.sim.uvm.replay import ACCESS
from uvm_kv.types import DTYPE_BYTES, GIB, KIB, MIB

FORMAT = "uvm-kv curves"
SCHEMA_VERSION = 1
ORIGINS = ("measured", "generated")
DIRECTIONS = ("h2d", "d2h")
PREFETCH_CASES = ("from_host", "resident", "evicting")
MIN_NUMBER, MAX_NUMBER = 1e-12, 1 << 46

FIELDS: dict[str, dict[str, Any]] = {
    "link": {"direction": DIRECTIONS, "other_direction": ("idle", "busy"), "bytes": int},
    "copy": {"direction": DIRECTIONS, "bytes": int},
    "zero_copy": {"footprint_bytes": int},
    "hbm": {"bytes": int},
    "prefetch": {"case": PREFETCH_CASES, "num_chunks": int},
    "fault": {
        "prefetcher": tuple(Prefetcher),
        "access": ACCESS,
        "capacity_bytes": int,
        "working_set_ratio": float,
        "passes": list,
    },
    "operators": {"layer_name": str, "tokens": int},
}
"""Coordinates of a point of each curve: a type, or the allowed words."""
MIN_POINTS = {"link": 2, "copy": 2, "zero_copy": 1, "hbm": 2, "prefetch": 2, "fault": 2, "operators": 3}
"""Least number of points of each curve; for `operators`, of each operator."""
CARD = {"memory_bytes": int, "hbm_gb_per_s": float, "tensor_tflop_per_s": float, "tensor_int8_top_per_s": float}
CARD_OPTIONAL = {"float32_tflop_per_s": float}
"""Without it the profile serves no float32."""
MAX_NUM_CHUNKS = 1 << 20
MAX_RANDOM_BYTES = GIB
"""Largest working set for a random walk, because the driver model takes such a walk fault by fault."""

OPERATORS = (
    *("embedding", "input_layernorm", "q_proj", "k_proj", "v_proj", "rope", "attn", "o_proj", "post_layernorm"),
    *("gate_proj", "up_proj", "act_fn", "down_proj", "final_layernorm", "lm_head"),
)
"""In the order of a step."""


def _studies() -> list[dict[str, Any]]:
    """First touches without and with evictions, and what comes back; at random only what fits."""
    kinds = [("stream", 0.75, 2), ("stream", 1.5, 4), ("random", 0.125, 2)]
    return [
        {
            "prefetcher": str(prefetcher),
            "access": access,
            "capacity_bytes": GIB,
            "working_set_ratio": ratio,
            "passes": list("ABAB"[:length]),
        }
        for prefetcher in Prefetcher
        for access, ratio, num_passes in kinds
        for length in range(1, num_passes + 1)
    ]


COPY_SIZES = [4 * KIB << 2 * i for i in range(9)]
PLAN: dict[str, list[dict[str, Any]]] = {
    "link": [
        {"direction": direction, "other_direction": other, "bytes": size * MIB}
        for direction in DIRECTIONS
        for other in ("idle", "busy")
        for size in (64, 256, 1024)
    ],
    "copy": [{"direction": direction, "bytes": size} for direction in DIRECTIONS for size in COPY_SIZES],
    "zero_copy": [{"footprint_bytes": int(gib * GIB)} for gib in (0.25, 1, 2, 4, 6, 8, 10, 15, 20)],
    "hbm": [{"bytes": size * MIB} for size in (4, 16, 64, 256, 1024)],
    "prefetch": [{"case": case, "num_chunks": num} for case in PREFETCH_CASES for num in (1, 4, 16, 64, 256)],
    "fault": _studies(),
    "operators": [{"layer_name": name, "tokens": 1 << i} for name in OPERATORS for i in range(12)],
}
"""The points that a full calibration measures."""
WHAT = {
    "link": "pinned copies, the other direction idle or busy throughout",
    "copy": "one cudaMemcpyAsync of pinned memory",
    "zero_copy": "a kernel reads mapped pinned memory once",
    "hbm": "one copy within the card's memory",
    "prefetch": "one cudaMemPrefetchAsync to the card, in chunks of 2 MiB",
    "fault": "a kernel adds one to all of half a managed range that the CPU has written",
    "operators": "one operator of a model, half precision",
}


def plan_lines() -> list[str]:
    """The points that a calibration would measure, one line per curve."""
    lines = []
    for curve, points in PLAN.items():
        seen: dict[str, list[str]] = {}
        for point in points:
            at = {name: _short(name, value) for name, value in point.items()}
            if curve == "fault":  # Not every pass of every walk.
                walk = f"{at['access']} over {at['working_set_ratio']} of {at['capacity_bytes']}, passes"
                at = {"prefetcher": at["prefetcher"], walk: at["passes"]}
            for name, value in at.items():
                seen.setdefault(name, []).append(value)
        where = "; ".join(f"{name} {', '.join(dict.fromkeys(values))}" for name, values in seen.items())
        lines.append(f"{curve} ({len(points)} points): {WHAT[curve]}: {where}")
    return lines


def _short(name: str, value: Any) -> str:
    if isinstance(value, list):
        return "".join(value)
    if not name.endswith("bytes"):
        return str(value)
    unit, scale = next((u, s) for u, s in (("GiB", GIB), ("MiB", MIB), ("KiB", KIB), ("B", 1)) if value >= s)
    return f"{value / scale:g} {unit}"


@dataclass(frozen=True)
class Point:
    at: Mapping[str, Any]
    """Coordinates of the point, with the keys of FIELDS."""
    repeats: tuple[float, ...]
    """Seconds of each repeat."""

    @property
    def seconds(self) -> float:
        return median(self.repeats)

    @property
    def spread(self) -> float | None:
        """Relative: 1.4826 times the median absolute deviation, over the median. None for a single repeat."""
        if len(self.repeats) < 2:
            return None
        return 1.4826 * median(abs(s - self.seconds) for s in self.repeats) / self.seconds


@dataclass(frozen=True)
class Curves:
    file: str
    """Name of the curves file, without its folder."""
    sha256: str
    origin: str
    date: str
    tool: str
    commit: str | None
    card: str
    driver: str | None
    nominal: Mapping[str, float]
    """The card's figures by their names in `gpu` of a profile."""
    curves: Mapping[str, tuple[Point, ...]]
    model: ModelGeometry | None
    """Shape of the model whose operators were timed."""
    dtype: str | None


class _Reader:
    def __init__(self, path: Path) -> None:
        self.path = path

    def error(self, what: str) -> ValueError:
        return ValueError(f"curves={self.path}: {what} (docs/calibration.md)")

    def object(self, node: Any, where: str, required: Mapping[str, Any], optional: tuple[str, ...] = ()) -> dict:  # type: ignore[type-arg]
        if not isinstance(node, dict):
            raise self.error(f"{where} is not a JSON object")
        for key in node:
            if key not in required and key not in optional:
                raise self.error(str(unknown(f"the field of {where}", key, [*required, *optional])))
        for key in required:
            if key not in node:
                raise self.error(f"{where} has no {key}; it must have {', '.join(required)}")
        return node

    def text(self, value: Any, where: str) -> str:
        # It ends up in a YAML file that OmegaConf reads, in which a dollar and a brace begin an interpolation.
        if not isinstance(value, str) or not value.strip() or not value.isprintable() or "${" in value:
            raise self.error(f"{where} is {value!r}; it must be a line of text")
        return value

    def optional_text(self, value: Any, where: str) -> str | None:
        return None if value is None else self.text(value, where)

    def number(self, value: Any, where: str, kind: type) -> Any:
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not MIN_NUMBER <= value <= MAX_NUMBER:
            raise self.error(f"{where} is {value!r}; it must be a positive number, at most {MAX_NUMBER}")
        if kind is int and not isinstance(value, int):
            raise self.error(f"{where} is {value!r}; it must be a whole number")
        return value if kind is int else float(value)

    def word(self, value: Any, where: str, allowed: tuple[str, ...]) -> str:
        if value not in allowed:
            raise self.error(str(unknown(where, str(value), allowed)))
        return str(value)

    def coordinate(self, value: Any, where: str, kind: Any) -> Any:
        if isinstance(kind, tuple):
            return self.word(value, where, kind)
        if kind is str:
            return self.text(value, where)
        if kind is list:
            if not isinstance(value, list) or not value or not all(half in ("A", "B") for half in value):
                raise self.error(f"{where} is {value!r}; it is a list of A and B, the last the pass that was timed")
            return value
        return self.number(value, where, kind)

    def points(self, node: Any, curve: str) -> tuple[Point, ...]:
        if not isinstance(node, list):
            raise self.error(f"curves.{curve} is not a list of points")
        points = []
        seen: dict[str, int] = {}
        for index, raw in enumerate(node):
            where = f"curves.{curve}[{index}]"
            self.object(raw, where, {**FIELDS[curve], "seconds": list})
            at = {name: self.coordinate(raw[name], f"{where}.{name}", kind) for name, kind in FIELDS[curve].items()}
            self.limit(at, where, curve)
            if not isinstance(raw["seconds"], list) or not raw["seconds"]:
                raise self.error(f"{where}.seconds is {raw['seconds']!r}; it is a list of the time of every repeat")
            repeats = tuple(self.number(s, f"{where}.seconds[{i}]", float) for i, s in enumerate(raw["seconds"]))
            first = seen.setdefault(json.dumps(at), index)
            if first != index:
                raise self.error(f"{where} is taken where curves.{curve}[{first}] is; put repeats into its seconds")
            points.append(Point(at, repeats))
        groups = [p.at["layer_name"] for p in points] if curve == "operators" else [curve] * len(points)
        for group in dict.fromkeys(groups or [curve]):
            if groups.count(group) < MIN_POINTS[curve]:
                of = f" of {group}" if curve == "operators" else ""
                raise self.error(
                    f"curves.{curve} has {groups.count(group)} points{of}; it needs at least {MIN_POINTS[curve]}, "
                    f"taken at different places; add some, or leave the curve out"
                )
        return tuple(points)

    def limit(self, at: Mapping[str, Any], where: str, curve: str) -> None:
        if curve == "prefetch" and at["num_chunks"] > MAX_NUM_CHUNKS:
            raise self.error(f"{where}.num_chunks is {at['num_chunks']}; it must be at most {MAX_NUM_CHUNKS}")
        if curve == "fault" and at["access"] == "random":
            size = at["capacity_bytes"] * at["working_set_ratio"]
            if size > MAX_RANDOM_BYTES:
                raise self.error(
                    f"{where} walks {size:.3g} bytes at random; the driver model takes at most {MAX_RANDOM_BYTES}: "
                    f"measure with a smaller working_set_ratio"
                )

    def model(self, raw: Mapping[str, Any]) -> tuple[ModelGeometry | None, str | None]:
        if "model" not in raw and "operators" not in raw["curves"]:
            return None, None
        if "model" not in raw:
            raise self.error("curves.operators needs a model: its shape, at the top level of the file")
        flags = ("gated_mlp", "rope", "tied_embeddings")
        names = {f.name: f.type for f in fields(ModelGeometry) if f.default is MISSING}
        node = dict(self.object(raw["model"], "model", {**names, "dtype": str}, flags))
        dtype = self.word(node.pop("dtype"), "model.dtype", tuple(DTYPE_BYTES))
        for name, value in node.items():
            if name in flags and not isinstance(value, bool):
                raise self.error(f"model.{name} is {value!r}; it is true or false")
            if name == "name":
                self.text(value, "model.name")
            elif name not in flags:
                self.number(value, f"model.{name}", int)
        try:
            model = ModelGeometry(**node)
        except ValueError as error:
            raise self.error(str(error)) from None
        precision = Precision()
        work = operator_work(model, 1, precision) | head_work(model, 1, precision)
        work |= {"attn": attention_work(model, 1, 0, precision), "embedding": embedding_work(model, 1, precision)}
        for index, point in enumerate(raw["curves"].get("operators", ())):
            self.word(point["layer_name"], f"curves.operators[{index}].layer_name", tuple(work))
        return model, dtype

    def read(self) -> Curves:
        try:
            content = self.path.read_bytes()
        except OSError as error:
            raise ValueError(
                f"curves={self.path} cannot be read ({error.strerror}); give a file of curves (docs/calibration.md)"
            ) from None
        try:
            raw = json.loads(content)
        except (ValueError, RecursionError) as error:
            raise self.error(f"not JSON ({error})") from None
        # Before all else, so that a file of another version is not blamed for its fields.
        for key, expected in (("format", FORMAT), ("schema_version", SCHEMA_VERSION)):
            given = raw.get(key) if isinstance(raw, dict) else None
            if given != expected or isinstance(given, bool):
                raise self.error(f"{key} is {given!r}; this version reads {expected!r}")
        top = ("format", "schema_version", "origin", "date", "tool", "commit", "card", "curves")
        self.object(raw, "the file", dict.fromkeys(top), ("model",))
        card = self.object(raw["card"], "card", {"name": str, "driver": str, **CARD}, tuple(CARD_OPTIONAL))
        if not isinstance(raw["curves"], dict) or not raw["curves"]:
            raise self.error(f"curves holds no curve; allowed: {', '.join(FIELDS)}")
        curves = {}
        for curve, points in raw["curves"].items():
            if curve not in FIELDS:
                raise self.error(str(unknown("curve", curve, FIELDS)))
            curves[curve] = self.points(points, curve)
        model, dtype = self.model(raw)
        nominal = CARD | {name: kind for name, kind in CARD_OPTIONAL.items() if name in card}
        if dtype == "float32" and "float32_tflop_per_s" not in nominal:
            raise self.error("model.dtype is float32, so that card must have float32_tflop_per_s")
        try:
            day = date.fromisoformat(raw["date"]).isoformat()
        except (TypeError, ValueError):
            raise self.error(f"date is {raw['date']!r}; it must be a day such as 2026-01-31") from None
        return Curves(
            self.path.name if self.path.name.isprintable() else "a file",
            hashlib.sha256(content).hexdigest(),
            self.word(raw["origin"], "origin", ORIGINS),
            day,
            self.text(raw["tool"], "tool"),
            self.optional_text(raw["commit"], "commit"),
            self.text(card["name"], "card.name"),
            self.optional_text(card["driver"], "card.driver"),
            {name: self.number(card[name], f"card.{name}", kind) for name, kind in nominal.items()},
            curves,
            model,
            dtype,
        )


def read_curves(path: Path) -> Curves:
    """ValueError of a line for a file that cannot be read, is of another version, or holds what makes no sense."""
    return _Reader(path).read()
