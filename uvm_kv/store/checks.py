"""Type checks of all that is read from results. They run once, where a file is read, so that readers can index fields.

Files may be damaged, edited, or written by another program. A wrong value is a ValueError of one line, which names the
field, its value and what it must be. Numbers are finite; text that a run wrote is one line without control characters.
"""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Callable, Iterable, Mapping
from datetime import datetime
from typing import Any, NamedTuple

MAX_INT = 2**63 - 1
MAX_FLOAT = 1e30
MAX_TEXT = 500
"""Characters in a text of a summary, but for warnings."""
MAX_DEPTH = 20
"""Deepest nesting of objects."""
ANALYTIC = "analytic"
"""The origin of points that are computed, not run."""
ORIGINS = ("simulated", "measured", "replayed", ANALYTIC)
HIDDEN = {"Cc", "Cf", "Cs", "Co", "Zl", "Zp"}
"""Unicode categories that steer a terminal, turn the direction of text, or cannot be printed."""


# ---- text


def visible(text: object) -> str:
    """Text for a terminal or a file that people read: what steers a terminal is written as an escape, `\\x1b`; ends of
    lines and tabs stay."""
    text = str(text)
    if text.isascii() and text.isprintable():  # Nearly all, and much quicker.
        return text
    return "".join(c if c in "\n\t" or unicodedata.category(c) not in HIDDEN else _escape(c) for c in text)


def _escape(character: str) -> str:
    number = ord(character)
    return f"\\x{number:02x}" if number < 0x100 else f"\\u{number:04x}" if number < 0x10000 else f"\\U{number:08x}"


def is_plain(text: str) -> bool:
    """Whether it is one line that `visible` leaves as it is."""
    if text.isascii():
        return text.isprintable()
    return "\n" not in text and "\t" not in text and visible(text) == text


def short(value: object) -> str:
    """A value as it is shown in a message: one short line."""
    text = visible(repr(value))
    return text if len(text) <= 60 else f"{text[:57]}..."


def formula_safe(value: Any) -> Any:
    """A cell that a spreadsheet takes as text: one that begins as a formula gets an apostrophe before it. A number that
    is written as text stays."""
    if isinstance(value, str) and value[:1] in ("=", "+", "-", "@", "\t", "\r") and len(value) > 1:
        try:
            float(value.rstrip(" %"))
        except ValueError:
            return f"'{value}"
    return value


# ---- JSON


def parse_json(content: str | bytes) -> Any:
    """ValueError for what is not JSON, has a number that is not finite, or objects within objects without end."""
    try:
        value = json.loads(content, parse_constant=_refuse, parse_float=_finite)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if isinstance(value, dict | list):
        _check_depth(value)
    return value


def _refuse(word: str) -> Any:
    raise ValueError(f"it holds {word}, which is no number of a result")


def _finite(text: str) -> float:
    value = float(text)
    if abs(value) > MAX_FLOAT:
        raise ValueError(f"it holds {text[:20]}, which is no number of a result")
    return value


def _check_depth(value: Any) -> None:
    level = [value]
    for _ in range(MAX_DEPTH):
        children = [node.values() if type(node) is dict else node for node in level]
        level = [child for nodes in children for child in nodes if type(child) is dict or type(child) is list]
        if not level:
            return
    raise ValueError("it is nested too deeply")


# ---- fields


class Kind(NamedTuple):
    """A kind of value: its description and its test."""

    words: str
    fits: Callable[[Any], bool]

    def __or__(self, other: Any) -> Kind:
        """This or another kind."""
        return Kind(f"{self.words} or {other.words}", lambda x: self.fits(x) or other.fits(x))


def _is_int(x: Any) -> bool:
    return isinstance(x, int) and not isinstance(x, bool) and abs(x) <= MAX_INT


def _is_number(x: Any) -> bool:
    return _is_int(x) or (isinstance(x, float) and abs(x) <= MAX_FLOAT)  # Not NaN, of which no comparison holds.


def _is_time(x: Any) -> bool:
    try:
        return isinstance(x, str) and datetime.fromisoformat(x).tzinfo is not None
    except ValueError:
        return False


def _is_scalar(x: Any) -> bool:
    return x is None or isinstance(x, bool) or _is_number(x) or (isinstance(x, str) and is_plain(x))


def list_of(kind: Kind, length: int | None = None) -> Kind:
    words = f"a list of {kind.words}" if length is None else f"a list of {length}, each {kind.words}"
    return Kind(
        words, lambda x: isinstance(x, list) and length in (None, len(x)) and all(kind.fits(item) for item in x)
    )


def dict_of(kind: Kind, names: Iterable[str] = ()) -> Kind:
    needed = tuple(names)
    of = f" with {', '.join(needed)}" if needed else ""
    return Kind(
        f"an object of {kind.words}{of}",
        lambda x: (
            isinstance(x, dict)
            and all(is_plain(key) for key in x)
            and all(name in x for name in needed)
            and all(kind.fits(item) for item in x.values())
        ),
    )


NULL = Kind("null", lambda x: x is None)
BOOL = Kind("true or false", lambda x: isinstance(x, bool))
INT = Kind("a whole number", _is_int)
COUNT = Kind("a whole number, at least 0", lambda x: _is_int(x) and x >= 0)
POSITIVE = Kind("a whole number, at least 1", lambda x: _is_int(x) and x >= 1)
NUMBER = Kind("a number", _is_number)
AMOUNT = Kind("a number, at least 0", lambda x: _is_number(x) and x >= 0)
TEXT = Kind(
    f"a text in one line, of 1 to {MAX_TEXT} characters",
    lambda x: isinstance(x, str) and 0 < len(x) <= MAX_TEXT and is_plain(x),
)
ANY_TEXT = Kind("a text", lambda x: isinstance(x, str))
WARNING = Kind("a text", lambda x: isinstance(x, str) and is_plain(x.replace("\n", "").replace("\t", "")))
TIME = Kind("a time in ISO 8601 with its zone", _is_time)
SCALAR = Kind("a number, text, true, false or null", _is_scalar)
SETTING = dict_of(SCALAR | list_of(SCALAR) | dict_of(SCALAR | list_of(SCALAR)))
ORIGIN = Kind(f"one of {', '.join(ORIGINS)}", lambda x: x in ORIGINS)
DISTRIBUTION = dict_of(AMOUNT | NULL, ("mean", "p50", "p99"))
BUDGET_ROW = Kind(
    "a name and a number of bytes", lambda x: isinstance(x, list) and len(x) == 2 and TEXT.fits(x[0]) and INT.fits(x[1])
)

Fields = Mapping[str, Kind]

IDENTITY: Fields = {
    "schema_version": INT,
    "origin": ORIGIN,
    "runner": TEXT,
    "engine": TEXT,
    "hardware": TEXT,
    "model": TEXT,
    "weights": TEXT | NULL,
    "mechanism": TEXT,
    "memory": TEXT | NULL,
    "placement": TEXT | NULL,
    "reach": TEXT | NULL,
    "hints": SETTING | NULL,
    "scheduler": TEXT | NULL,
    "admission": TEXT | NULL,
    "preemption": TEXT | NULL,
    "workload": TEXT,
    "arrival": TEXT,
    "request_rate": AMOUNT | NULL,
    "start": TEXT,
    "prompt_tokens": COUNT | NULL,
    "output_tokens": COUNT | NULL,
    "layout": TEXT | NULL,
    "block_size": POSITIVE | NULL,
    "allocation": TEXT | NULL,
    "dtype": TEXT,
    "weight_bits": AMOUNT | NULL,
    "kv_bits": AMOUNT | NULL,
    "offered_batch": POSITIVE,
    "working_set_ratio": AMOUNT | NULL,
    "link_h2d_gb_per_s": AMOUNT | NULL,
    "window_s": AMOUNT | NULL,
    "chunked_prefill": BOOL | NULL,
    "drawn": BOOL,
    "seed": INT,
    "repeat": COUNT,
    "setting": SETTING,
    "variant": SETTING,
}
"""The identity of a run: the first fields of a summary and of a record of failure."""
OUTCOME: Fields = {
    "running_batch_mean": AMOUNT | NULL,
    "running_batch_max": COUNT | NULL,
    "num_requests": COUNT,
    "num_measured_requests": COUNT,
    "num_steps": COUNT | NULL,
    "num_output_tokens": COUNT,
    "duration_s": AMOUNT,
    "steady_window_s": list_of(AMOUNT, 2) | NULL,
    "output_tokens_per_s": AMOUNT | NULL,
    "output_tokens_per_s_whole_run": AMOUNT | NULL,
    "ttft_s": DISTRIBUTION,
    "tpot_s": DISTRIBUTION,
    "e2e_s": DISTRIBUTION,
    "normalized_latency_s": DISTRIBUTION,
    "kv_bytes_mean": dict_of(AMOUNT | NULL),
    "h2d_bytes": COUNT | NULL,
    "d2h_bytes": COUNT | NULL,
    "link_bytes_by_cause": dict_of(COUNT | NULL),
    "gpu_fault_groups": COUNT | NULL,
    "evicted_chunks": COUNT | NULL,
    "preemptions": COUNT | NULL,
    "preemptions_by_kind": dict_of(COUNT | NULL),
    "stall_s": AMOUNT | NULL,
    "energy_j": AMOUNT | NULL,
    "energy_j_per_output_token": AMOUNT | NULL,
    "energy_j_per_output_token_above_idle": NUMBER | NULL,
    "power_w": AMOUNT | NULL,
    "idle_power_w": AMOUNT | NULL,
    "warnings": list_of(WARNING),
    "stopped_by": TEXT | NULL,
    "num_left_out": COUNT,
    "memory_budget": list_of(BUDGET_ROW),
    "device_kv_bytes": COUNT | NULL,
    "host_kv_bytes": COUNT | NULL,
    "memory_emulated": BOOL,
    "eviction": TEXT | NULL,
    "chunk_loss_bytes": AMOUNT | NULL,
    "closed_form_ceiling": NUMBER | NULL,
    "closed_form": dict_of(NUMBER | NULL) | NULL,
}
COMPUTED: Fields = {
    "stage": TEXT,
    "batch_size": POSITIVE,
    "sequence_length": POSITIVE,
    "counting": TEXT,
    "bits": TEXT,
    "fits": BOOL,
    **dict.fromkeys(("total_ms", "total_ops", "total_bytes", "weight_bytes", "kv_bytes", "activation_bytes"), AMOUNT),
    **dict.fromkeys(("required_bytes", "card_bytes", "peak_ops_per_s", "hbm_bytes_per_s"), AMOUNT),
    "parts": Kind("an object", lambda x: isinstance(x, dict)),
}
"""Fields of an analytic point."""
PROVENANCE: Fields = {
    "git_sha": TEXT | NULL,
    "git_dirty": BOOL | NULL,
    "versions": dict_of(ANY_TEXT | NULL),
    "machine": dict_of(SCALAR) | NULL,
    "gpu": dict_of(ANY_TEXT | NULL) | NULL,
    "memory_emulated": BOOL,
    "eviction": TEXT | NULL,
    "seed": INT,
    "repeat": COUNT,
    "argv": list_of(ANY_TEXT),
    "started": TIME | NULL,
    "duration_s": AMOUNT | NULL,
    "summary_sha256": TEXT,
    "files_sha256": dict_of(TEXT),
    "code_sha256": TEXT,
    "id": TEXT,
    "formerly": TEXT,
}
FAILURE: Fields = {
    **IDENTITY,
    "error": ANY_TEXT,
    "tried": BOOL,
    "refused": BOOL,
    "failed": TIME,
    "argv": list_of(ANY_TEXT),
    "git_sha": TEXT | NULL,
    "formerly": TEXT,
}
NEEDED = ("origin", "hardware", "model")
"""Fields that every summary of a run, or of an analytic point, must have."""
NEEDED_OF_RUN = (
    *(
        "mechanism",
        "memory",
        "placement",
        "admission",
        "workload",
        "arrival",
        "prompt_tokens",
        "output_tokens",
        "dtype",
    ),
    *("offered_batch", "repeat", "setting", "variant", "running_batch_mean", "num_requests", "num_steps"),
    *("num_output_tokens", "duration_s", "output_tokens_per_s", "output_tokens_per_s_whole_run", "ttft_s", "tpot_s"),
    *("normalized_latency_s", "h2d_bytes", "d2h_bytes", "gpu_fault_groups", "evicted_chunks", "preemptions", "stall_s"),
    *("energy_j_per_output_token", "warnings", "num_left_out", "memory_budget", "memory_emulated"),
    *("closed_form_ceiling", "runner", "steady_window_s"),
)
NEEDED_OF_MANIFEST = ("git_sha", "git_dirty", "argv", "started")
NEEDED_OF_RUNS_MANIFEST = (*NEEDED_OF_MANIFEST, "duration_s", "gpu", "seed", "repeat")
NEEDED_OF_FAILURE = ("error", "model", "mechanism", "offered_batch", "tried", "failed", "argv")


def check_fields(value: Any, fields: Fields, needed: Iterable[str], what: str) -> dict[str, Any]:
    """`value`, an object whose `fields`, as far as they are there, are what they must be, and that has all that is
    `needed`; others are ignored. ValueError if not; `what` names its file."""
    if not isinstance(value, dict):
        raise ValueError(f"{what} is {short(value)}, not an object of names and values")
    if absent := [name for name in needed if name not in value]:
        raise ValueError(f"{what} has no {', '.join(absent)}")
    for name, kind in fields.items():
        if name in value and not kind.fits(value[name]):
            raise ValueError(f"{what}: {name} is {short(value[name])}; it must be {kind.words}")
    for name in value:
        if not is_plain(name) or "." in name:
            raise ValueError(f"{what}: {short(name)} is no name of a field")
    return value


def check_summary(value: Any, what: str = "its summary.json") -> dict[str, Any]:
    """A summary of a run, or of an analytic point. ValueError if it is none."""
    fields = {**IDENTITY, **(OUTCOME if _is_run(value) else COMPUTED)}
    checked = check_fields(value, fields, NEEDED, what)
    needed = NEEDED_OF_RUN if _is_run(checked) else COMPUTED
    if absent := [name for name in needed if name not in checked]:
        raise ValueError(f"{what} has no {', '.join(absent)}")
    return checked


def _is_run(summary: Any) -> bool:
    return not (isinstance(summary, dict) and summary.get("origin") == ANALYTIC)


def check_manifest(value: Any, what: str = "its manifest.json", *, of_run: bool = True) -> dict[str, Any]:
    """A manifest, with control characters made visible. ValueError if it is none."""
    manifest = check_fields(value, PROVENANCE, NEEDED_OF_RUNS_MANIFEST if of_run else NEEDED_OF_MANIFEST, what)
    cleaned: dict[str, Any] = made_visible(manifest)
    return cleaned


def check_failure(value: Any, what: str) -> dict[str, Any]:
    """A record of a job that failed, with control characters made visible. ValueError if it is none."""
    cleaned: dict[str, Any] = made_visible(check_fields(value, FAILURE, NEEDED_OF_FAILURE, what))
    return cleaned


def made_visible(value: Any) -> Any:
    """A value of JSON whose texts are `visible`."""
    if isinstance(value, str):
        return visible(value)
    if isinstance(value, list):
        return [made_visible(item) for item in value]
    if isinstance(value, dict):
        return {visible(key): made_visible(item) for key, item in value.items()}
    return value


# ---- tables


def check_table(table: Mapping[str, Any], columns: Iterable[str], never_null: Iterable[str], what: str) -> None:
    """ValueError unless a table has these columns, of one length, of whole numbers from 0 on or null; `measured` is
    true or false."""
    if absent := [name for name in columns if name not in table]:
        raise ValueError(f"{what} has no column {', '.join(absent)}; record the run again")
    lengths = {len(table[name]) for name in table}
    if len(lengths) > 1:
        raise ValueError(f"{what} is damaged: its columns differ in length; record the run again")
    always = set(never_null)
    for name in columns:
        kind = BOOL if name == "measured" else COUNT if name in always else COUNT | NULL
        for number, value in enumerate(table[name]):
            if not kind.fits(value):
                raise ValueError(f"{what}, row {number}: {name} is {short(value)}; it must be {kind.words}")
