"""ReplayRunner: answers from a recorded step log and fails on the first differing plan."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from uvm_kv.kvcache.manager import KVCapacity
from uvm_kv.runner.base import ModelRunner
from uvm_kv.sched.plan import StepOutput, StepPlan
from uvm_kv.sched.request import Request


class PlanMismatch(RuntimeError):
    """The engine asked for another step than the recorded one."""


class ReplayRunner(ModelRunner):
    def __init__(self, capacity: KVCapacity, log: Iterable[tuple[StepPlan, StepOutput]]) -> None:
        self._capacity = capacity
        self._log: Iterator[tuple[StepPlan, StepOutput]] = iter(log)
        self._now_ns = 0

    def capacity(self) -> KVCapacity:
        return self._capacity

    def add(self, request: Request) -> None:
        pass

    def remove(self, request_id: int) -> None:
        pass

    def now_ns(self) -> int:
        return self._now_ns

    def wait_until_ns(self, time_ns: int) -> None:
        self._now_ns = max(self._now_ns, time_ns)

    def execute(self, plan: StepPlan) -> StepOutput:
        recorded = next(self._log, None)
        if recorded is None:
            raise PlanMismatch(f"step {plan.step}: the recording ends before it")
        expected, output = recorded
        for name, old, new in zip(StepPlan._fields, expected, plan, strict=True):
            if old != new:
                where, old, new = _difference(name, old, new)
                raise PlanMismatch(f"step {plan.step}, {where}: recorded {_short(old)}, planned {_short(new)}")
        self._now_ns = output.timing.end_ns
        return output

    def close(self) -> None:
        self._log = iter(())


def _difference(where: str, old: Any, new: Any) -> tuple[str, Any, Any]:
    """The first part in which two values differ, down to a field of a sequence or an op."""
    if isinstance(old, tuple) and isinstance(new, tuple) and len(old) == len(new):
        fields = getattr(old, "_fields", None)
        names = [f"[{i}]" for i in range(len(old))] if fields is None else [f".{field}" for field in fields]
        for name, a, b in zip(names, old, new, strict=True):
            if a != b:
                return _difference(where + name, a, b)
    return where, old, new


def _short(value: object, limit: int = 160) -> str:
    text = repr(value)
    return text if len(text) <= limit else text[:limit] + " ..."
