"""From the curves of a machine to the profile of its card. docs/calibration.md says what is identified from what.

Every curve is predicted by the formulas that the simulator charges (`uvm_kv.runner.sim.uvm.cost`; faults are counted
by running the driver model over the very passes that were timed), and the constants in them are fitted, curve by
curve, in the order link and copy, hbm, zero_copy, fault, prefetch, operators: each uses what the ones before it gave.
A constant that the curves cannot tell apart from the rest keeps the value of the base profile.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from math import sqrt
from statistics import median
from typing import Any

import numpy as np
from numpy.typing import NDArray

from uvm_kv.calibrate.curves import CARD_OPTIONAL, Curves, Point
from uvm_kv.hw.counting import Precision
from uvm_kv.hw.fit import all_work, fit_operators
from uvm_kv.hw.profile import HardwareProfile
from uvm_kv.hw.roofline import Roofline, peak_ops_per_s
from uvm_kv.runner.sim.uvm.block import FULL, Access, Counts, CpuAccess, Location, Prefetcher, Rules
from uvm_kv.runner.sim.uvm.cost import fault_s, prefetch_s
from uvm_kv.runner.sim.uvm.driver import UvmDriver
from uvm_kv.runner.sim.uvm.replay import Study, run_study
from uvm_kv.types import DTYPE_BYTES, GIB

Vector = NDArray[np.float64]

MAX_ERROR = 0.25
"""Relative standard error beyond which a constant counts as not identified."""
NOISE_FLOOR = 1e-3
"""Relative error of a point at least, whatever the residual: no clock and no model is better."""
MAX_WINDOW = 64
MIN_SHARE = 1e-3
SHARE_SLACK = 1.05
"""A share may come out above 1 by noise; beyond this the curves contradict each other."""
FAULT_CONSTANTS = ("evict_fixed_us", "fault_batch_us", "cpu_mapped_page_us", "scattered_page_us", "fault_block_us")
"""Constants of `managed` that the fault curves fit. Where the curves cannot separate them, the last one takes the
base's value first."""


@dataclass(frozen=True)
class Fit:
    values: dict[str, float]
    held: tuple[str, ...]
    """Not identified by the points: as they were."""
    given_held: tuple[str, ...]
    """Identified only because others are held."""
    errors: dict[str, float]
    """Relative standard errors of what was fitted."""
    residual: float
    """Root mean square of the relative residuals."""


@dataclass(frozen=True)
class CurveReport:
    curve: str
    num_points: int
    num_repeats: int
    """Least of any point."""
    spread: float | None
    """Median over the points of the relative spread of their repeats."""
    residual: float | None
    """Root mean square of the fit's relative residuals; None where the points are the result."""


@dataclass(frozen=True)
class Quantity:
    """One number of the new profile, or one list, or the costs of one operator."""

    path: str
    fitted: Any
    """None where it is the base's."""
    base: Any
    curve: str | None
    error: float | None
    """Relative standard error."""
    note: str = ""
    residual: float | None = None
    """Its own, where its curve is several fits."""


@dataclass(frozen=True)
class Calibration:
    profile: HardwareProfile
    quantities: list[Quantity]
    reports: list[CurveReport]


def fit(
    predict: Callable[[Mapping[str, float]], Vector],
    start: Mapping[str, float],
    measured: Vector,
    most: Mapping[str, float] | None = None,
    begin: Mapping[str, float] | None = None,
) -> Fit:
    """Fit constants, none below 0 or above `most`, to `measured` seconds: soft-L1 in the relative residuals.

    What the points do not identify is held at `start`, the last of `start` first. The search sets out from `begin`
    where that has a value, else from `start`.
    """
    from scipy.optimize import least_squares

    names = list(start)
    scale = {name: start[name] or 1.0 for name in names}
    free, held, vague = list(names), list[str](), set[str]()
    noise = 0.0
    while True:
        values = dict(start)

        def residuals(x: Vector, free: Sequence[str] = tuple(free)) -> Vector:
            found = {name: float(v) * scale[name] for name, v in zip(free, x, strict=True)}
            relative: Vector = predict({**start, **found}) / measured - 1
            return relative

        if not free:
            rms = float(np.sqrt(np.mean(residuals(np.zeros(0)) ** 2)))
            return Fit(values, tuple(held), (), {}, rms)
        first = np.array([(begin or start).get(name, start[name]) / scale[name] for name in free])
        upper = np.array([(most or {}).get(name, np.inf) / scale[name] for name in free])
        lower = np.array([MIN_SHARE / scale[name] if name in (most or {}) else 0.0 for name in free])
        solved = least_squares(
            residuals,
            np.clip(first, lower + 1e-6, upper - 1e-6),
            bounds=(lower, upper),
            loss="soft_l1",
            f_scale=0.1,
            xtol=1e-12,
            ftol=1e-12,
            gtol=1e-12,
        )
        values |= {name: float(x) * scale[name] for name, x in zip(free, solved.x, strict=True)}
        rest = residuals(solved.x)
        rms = float(np.sqrt(np.mean(rest**2)))
        # Of the first fit, in which all are free: a constant held at a wrong value is no noise.
        noise = noise or max(NOISE_FLOOR, rms * sqrt(len(rest) / max(1, len(rest) - len(free))))
        errors = noise * _deviations(solved.jac)
        # Of a constant that vanishes, it is enough to know that it is far below the base's.
        too_large = errors > MAX_ERROR * np.maximum(solved.x, 1.0)
        unknown = [name for name, is_large in zip(free, too_large, strict=True) if is_large]
        if not unknown:
            given = tuple(name for name in free if name in vague)
            relative = {n: float(e / x) for n, e, x in zip(free, errors, solved.x, strict=True) if x > 1e-6}
            return Fit(values, tuple(held), given, relative, rms)
        vague.update(unknown)
        held.append(unknown[-1])
        free.remove(unknown[-1])


def _deviations(jacobian: Vector) -> Vector:
    """Square roots of the diagonal of (J^T J)^-1; very large where J does not say."""
    _, singular, v = np.linalg.svd(np.asarray(jacobian), full_matrices=True)
    full = np.zeros(v.shape[0])
    full[: len(singular)] = singular
    deviations: Vector = np.sqrt((v**2 / np.maximum(full, 1e-9)[:, None] ** 2).sum(0))
    return deviations


def calibrate(curves: Curves, base: HardwareProfile, name: str) -> Calibration:
    """The profile `name` of the card that `curves` were taken on; ValueError where they contradict each other.

    What they do not tell is that of `base`. Needs scipy, in the extra `dev`.
    """
    if find_spec("scipy") is None:
        raise ValueError("a calibration needs scipy, in the extra 'dev': pip install -e '.[dev]'")
    return _Calibrator(curves, base, name).run()


class _Calibrator:
    def __init__(self, curves: Curves, base: HardwareProfile, name: str) -> None:
        self.curves = curves
        untold = dict.fromkeys(CARD_OPTIONAL.keys() - curves.nominal.keys())
        self.base = _with(base, "gpu", untold)  # What the curves do not tell of a card is no other card's.
        self.profile = dataclasses.replace(self.base, name=name)
        self.quantities: dict[str, Quantity] = {}
        self.reports: list[CurveReport] = []

    def run(self) -> Calibration:
        for key, value in self.curves.nominal.items():
            self._set(f"gpu.{key}", value, None, None, "nominal")
        self._link()
        self._hbm()
        self._zero_copy()
        self._fault()
        self._prefetch()
        self._operators()
        rows, sources = [], {}
        for path, base in quantities_of(self.base).items():
            row = self.quantities.pop(path, None) or Quantity(path, None, base, None, None, "not measured")
            rows.append(row)
            sources[path] = self._source(row)
        for path, row in self.quantities.items():  # What the base does not have.
            rows.append(row)
            sources[path] = self._source(row)
        return Calibration(dataclasses.replace(self.profile, sources=sources), rows, self.reports)

    # ---- the curves, in order

    def _link(self) -> None:
        """Pinned copies: time = call + bytes / rate, and of the rate a share while the other direction is busy."""
        points = [*self._points("copy"), *self._points("link")]
        if not points:
            return
        link = self.base.link
        start = {"h2d": link.h2d_gb_per_s, "d2h": link.d2h_gb_per_s, "copy_call_us": link.copy_call_us}
        start |= {"duplex_h2d": link.duplex_h2d, "duplex_d2h": link.duplex_d2h}
        size = np.array([p.at["bytes"] for p in points], float)
        directions = [p.at["direction"] for p in points]
        busy = [p.at.get("other_direction") == "busy" for p in points]

        def predict(x: Mapping[str, float]) -> Vector:
            share = np.array([x[f"duplex_{d}"] if b else 1.0 for d, b in zip(directions, busy, strict=True)])
            rate = np.array([x[d] for d in directions]) * 1e9 * share
            seconds: Vector = x["copy_call_us"] * 1e-6 + size / np.maximum(rate, 1.0)
            return seconds

        found = fit(predict, start, _seconds(points))
        paths = {key: f"link.{key}_gb_per_s" if key in ("h2d", "d2h") else f"link.{key}" for key in start}
        curve = " and ".join(c for c in ("link", "copy") if self._points(c))
        self._take(found, paths, curve)
        for name in ("link", "copy"):
            if mine := [i for i, p in enumerate(points) if p in self._points(name)]:
                rest = predict(found.values)[mine] / _seconds(points)[mine] - 1
                self._report(name, float(np.sqrt(np.mean(rest**2))))

    def _hbm(self) -> None:
        """A copy within the card reads and writes its bytes."""
        points = self._points("hbm")
        if not points:
            return
        nominal = self.profile.gpu.hbm_gb_per_s * 1e9
        size = np.array([p.at["bytes"] for p in points], float)
        start = {"hbm_efficiency": self.base.gpu.hbm_efficiency, "call_us": self.profile.link.copy_call_us}
        found = fit(
            lambda x: x["call_us"] * 1e-6 + 2 * size / np.maximum(nominal * x["hbm_efficiency"], 1.0),
            start,
            _seconds(points),
        )
        self._take(found, {"hbm_efficiency": "gpu.hbm_efficiency"}, "hbm")
        self._report("hbm", found.residual)

    def _zero_copy(self) -> None:
        """Rates over the rate of a pinned copy; linear in between, so the points are the result."""
        points = sorted(self._points("zero_copy"), key=lambda p: int(p.at["footprint_bytes"]))
        if not points:
            return
        size = np.array([p.at["footprint_bytes"] for p in points], float)
        shares = size / _seconds(points) / self.profile.link.h2d_bytes_per_s
        checked = [self._share("link.zero_copy_share", share, "zero_copy") for share in shares]
        link = dataclasses.replace(
            self.profile.link,
            zero_copy_gib=tuple(_rounded(s / GIB) for s in size),
            zero_copy_share=tuple(_rounded(s) for s in checked),
        )
        self.profile = dataclasses.replace(self.profile, link=link)
        for name in ("zero_copy_gib", "zero_copy_share"):
            path = f"link.{name}"
            self.quantities[path] = Quantity(
                path, getattr(link, name), getattr(self.base.link, name), "zero_copy", None
            )
        self._report("zero_copy", None)

    def _fault(self) -> None:
        """Passes over CPU-initialised memory: their times are linear in the constants, given the pages in flight."""
        from scipy.optimize import nnls

        points = self._points("fault")
        if not points:
            return
        passes = _Passes(points, self.profile)
        measured = _seconds(points)
        misfits = {}
        for window in range(1, MAX_WINDOW + 1):
            known, columns = passes.linear(window)
            scaled = columns / measured[:, None]
            norms = np.maximum(np.linalg.norm(scaled, axis=0), 1e-300)
            _, misfit = nnls(scaled / norms, 1 - known / measured)
            misfits[window] = float(misfit) / sqrt(len(points))
        best = min(misfits.values())
        alike = [window for window, misfit in misfits.items() if misfit <= 1.1 * best + NOISE_FLOOR]
        old = self.base.managed.stream_fault_pages
        window = min(alike, key=lambda w: (abs(w - old), w))
        known, columns = passes.linear(window)
        start = {name: getattr(self.base.managed, name) for name in FAULT_CONSTANTS}
        found = fit(lambda x: known + columns @ np.array([x[name] for name in FAULT_CONSTANTS]), start, measured)
        if found.residual > 2 * misfits[window] + 0.02:
            kept = ", ".join(f"{name}={start[name]:g}" for name in found.held)
            raise ValueError(
                f"the fault curve does not go with {kept} of the base ({found.residual:.0%} off) and cannot tell them "
                f"apart from the rest; take another base, or measure the passes of docs/calibration.md that do"
            )
        self._take(found, {name: f"managed.{name}" for name in FAULT_CONSTANTS}, "fault")
        if len(alike) == 1:
            self._set("managed.stream_fault_pages", window, "fault", None)
        else:
            span = f"from {alike[0]} to {alike[-1]} several fit alike"
            fitted = None if window == old else window
            self._set("managed.stream_fault_pages", fitted, "fault", None, f"not identified: {span}")
        self._report("fault", found.residual)

    def _prefetch(self) -> None:
        points = self._points("prefetch")
        if not points:
            return
        start = {"prefetch_call_us": self.base.link.prefetch_call_us, "prefetch_share": self.base.link.prefetch_share}
        start |= {"prefetch_overlap": self.base.managed.prefetch_overlap}
        start |= {"prefetch_chunk_us": self.base.link.prefetch_chunk_us}
        counts = [prefetch_counts(p.at["case"], p.at["num_chunks"]) for p in points]

        def predict(x: Mapping[str, float]) -> Vector:
            link = {name: value for name, value in x.items() if name != "prefetch_overlap"}
            profile = _with(_with(self.profile, "link", link), "managed", {"prefetch_overlap": x["prefetch_overlap"]})
            chunks = [p.at["num_chunks"] for p in points]
            return np.array([prefetch_s(c, 1, n, profile) for c, n in zip(counts, chunks, strict=True)])

        most = {"prefetch_share": 1.0, "prefetch_overlap": 1.0}
        # From little overlap, where the link is what a prefetch waits for: with much, it is the CPU, and no slope.
        found = fit(predict, start, _seconds(points), most, {"prefetch_overlap": MIN_SHARE})
        paths = {name: f"managed.{name}" if name == "prefetch_overlap" else f"link.{name}" for name in start}
        self._take(found, paths, "prefetch")
        self._report("prefetch", found.residual)

    def _operators(self) -> None:
        points = self._points("operators")
        model, dtype = self.curves.model, self.curves.dtype
        if not points or model is None or dtype is None:
            return
        table: dict[str, dict[int, float]] = {}
        for point in points:
            table.setdefault(point.at["layer_name"], {})[point.at["tokens"]] = point.seconds
        size = DTYPE_BYTES[dtype]
        gpu = self.profile.gpu
        peak = peak_ops_per_s(self.profile, 8 * size)
        costs = fit_operators(
            table, model, peak_flop_per_s=peak, hbm_bytes_per_s=gpu.hbm_gb_per_s * 1e9, dtype_bytes=size
        )
        self.profile = dataclasses.replace(
            self.profile,
            operators={**self.base.operators, **costs},
            sources={**self.base.sources, "operators": "these curves"},
        )
        roofline = Roofline(self.profile, model, size, Precision.of_bytes(size))
        squares = []
        for operator, cost in costs.items():
            path = f"operators.{operator}"
            rest = [
                roofline.operator_s(operator, *all_work(model, tokens, size)[operator]) / seconds - 1
                for tokens, seconds in table[operator].items()
            ]
            squares += [r * r for r in rest]
            off = sqrt(np.mean(np.square(rest)))
            old = self.base.operators.get(operator)
            self.quantities[path] = Quantity(path, cost, old, "operators", None, residual=off)
        self._report("operators", sqrt(sum(squares) / len(squares)))

    # ---- keeping what was found

    def _points(self, curve: str) -> tuple[Point, ...]:
        return self.curves.curves.get(curve, ())

    def _take(self, found: Fit, paths: Mapping[str, str], curve: str) -> None:
        """What a fit found, into the profile; `paths` leaves out what is of no further use."""
        held = ", ".join(f"{name}={found.values[name]:g}" for name in found.held if name in paths)
        for name, path in paths.items():
            if name in found.held:
                self._set(path, None, curve, None, "not identified by the curve")
                continue
            value = found.values[name]
            if path.endswith(("_share", "hbm_efficiency", "_overlap")) or path.startswith("link.duplex"):
                value = self._share(path, value, curve)
            note = f"given {held} of the base" if name in found.given_held and held else ""
            self._set(path, _rounded(value), curve, found.errors.get(name), note)

    def _set(self, path: str, value: float | None, curve: str | None, error: float | None, note: str = "") -> None:
        group, name = path.split(".")
        base = getattr(getattr(self.base, group), name)
        self.quantities[path] = Quantity(path, value, base, curve, error, note)
        if value is not None:
            self.profile = _with(self.profile, group, {name: value})

    def _share(self, path: str, value: float, curve: str) -> float:
        if value > SHARE_SLACK:
            whole = "card.hbm_gb_per_s" if path.startswith("gpu.") else "the rate of pinned copies"
            raise ValueError(
                f"curves.{curve} makes {path} {value:.3g}, but a share is at most 1: check the points, and {whole}"
            )
        return min(1.0, value)

    def _report(self, curve: str, residual: float | None) -> None:
        points = self._points(curve)
        spreads = [p.spread for p in points if p.spread is not None]
        self.reports.append(
            CurveReport(
                curve,
                len(points),
                min(len(p.repeats) for p in points),
                median(spreads) if spreads else None,
                residual,
            )
        )

    def _source(self, row: Quantity) -> str:
        c = self.curves
        origin = "measured" if c.origin == "measured" else "generated, not measured, as if"
        file = f"curves file sha256 {c.sha256[:12]}"
        if row.note == "nominal":
            return f"nominal, as given for {c.card} beside {c.origin} curves, {c.date} ({file})"
        if row.fitted is None:
            why = "not measured" if row.curve is None else f"not measured (curve {row.curve}: {row.note})"
            return f"{why}; that of {self.base.name}: {self.base.source_of(row.path)}"
        reports = [r for r in self.reports if row.curve is not None and r.curve in row.curve.split(" and ")]
        spreads = [r.spread for r in reports if r.spread is not None]
        repeats = min(r.num_repeats for r in reports)
        noise = f"relative spread {_percent(max(spreads))} over" if spreads else "spread unknown,"
        parts = [f"{noise} {repeats} repeat{'s' if repeats > 1 else ''}"]
        if row.error is not None:
            parts.append(f"standard error {_percent(row.error)}")
        residuals = [r.residual for r in reports if r.residual is not None]
        if row.residual is not None or residuals:
            parts.append(f"residual of the fit {_percent(max(residuals) if row.residual is None else row.residual)}")
        parts += [row.note] if row.note else []
        where = f"{origin} on {c.card}, {c.date}, driver {c.driver or 'unknown'}, curve {row.curve}"
        return f"{where}: {', '.join(parts)} ({file})"


class _Passes:
    """The timed passes, as the driver model counts them: seconds = known + columns @ constants."""

    def __init__(self, points: Sequence[Point], profile: HardwareProfile) -> None:
        self._points = points
        self._free = _with(profile, "managed", dict.fromkeys(FAULT_CONSTANTS, 0.0))
        """The profile with faults for nothing but their copies."""
        self._unit = [_with(self._free, "managed", {name: 1.0}) for name in FAULT_CONSTANTS]
        self._studied = cache(self._study)
        for index in range(len(points)):
            self._row(index, 1)  # So that an impossible study is named at once.

    def linear(self, window: int) -> tuple[Vector, Vector]:
        rows = [self._row(index, window) for index in range(len(self._points))]
        return np.array([known for known, _ in rows]), np.array([columns for _, columns in rows])

    def _row(self, index: int, window: int) -> tuple[float, list[float]]:
        at = self._points[index].at
        # A pass at random does not depend on how many pages a stream has in flight.
        window = window if at["access"] == "stream" else 1
        key = (at["prefetcher"], at["access"], at["capacity_bytes"], at["working_set_ratio"])
        longest = max(
            (
                p.at["passes"]
                for p in self._points
                if key == (p.at["prefetcher"], p.at["access"], p.at["capacity_bytes"], p.at["working_set_ratio"])
                and p.at["passes"][: len(at["passes"])] == at["passes"]
            ),
            key=len,
        )
        try:
            passes = self._studied(*key, tuple(longest), window)
        except ValueError as error:
            raise ValueError(f"curves.fault[{index}]: {error}") from None
        return passes[len(at["passes"]) - 1]

    def _study(
        self, prefetcher: str, access: str, capacity: int, ratio: float, passes: tuple[str, ...], window: int
    ) -> list[tuple[float, list[float]]]:
        profile = _with(self._free, "managed", {"stream_fault_pages": window})
        study = Study(capacity, ratio, passes, access)
        results = run_study(study, profile, Rules(Prefetcher(prefetcher)))
        return [
            (r.seconds, [fault_s(r.counts, u) - fault_s(r.counts, self._free) for u in self._unit]) for r in results
        ]


def prefetch_counts(case: str, num_chunks: int) -> Counts:
    """What one cudaMemPrefetchAsync of `num_chunks` chunks to the card does, in a case of PREFETCH_CASES."""
    driver = UvmDriver(2 * num_chunks, num_chunks)
    driver.do(range(num_chunks), CpuAccess(FULL, write=True))
    if case == "resident":
        driver.prefetch(range(num_chunks), Location.DEVICE)
    elif case == "evicting":
        driver.do(range(num_chunks, 2 * num_chunks), Access(FULL, True))
    return driver.prefetch(range(num_chunks), Location.DEVICE)


def quantities_of(profile: HardwareProfile) -> dict[str, Any]:
    """Every number of a profile by its dotted path; an operator's costs are one."""
    found: dict[str, Any] = {}
    for group in ("gpu", "link", "managed", "power"):
        node = getattr(profile, group)
        values = {f"{group}.{f.name}": getattr(node, f.name) for f in dataclasses.fields(node)}
        found |= {path: value for path, value in values.items() if value is not None}
    return found | {f"operators.{name}": cost for name, cost in profile.operators.items()}


def _with(profile: HardwareProfile, group: str, changes: Mapping[str, float | None]) -> HardwareProfile:
    return dataclasses.replace(profile, **{group: dataclasses.replace(getattr(profile, group), **changes)})


def _seconds(points: Sequence[Point]) -> Vector:
    return np.array([p.seconds for p in points])


def _rounded(value: float) -> float:
    """To what is worth writing down: six digits, and nothing below a millionth."""
    return 0.0 if abs(value) < 1e-6 else float(f"{value:.6g}")


def _percent(share: float) -> str:
    return f"{100 * share:.2g} %"
