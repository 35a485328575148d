"""Engine: admit, schedule, execute, update, record. It receives a runner and never asks which one."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from math import inf

from uvm_kv.runner.base import ModelRunner
from uvm_kv.sched.scheduler import Scheduler
from uvm_kv.telemetry.recorder import Recorder
from uvm_kv.workload.source import RequestSource


class Engine:
    def __init__(self, scheduler: Scheduler, runner: ModelRunner, source: RequestSource, recorder: Recorder) -> None:
        self.scheduler = scheduler
        self.runner = runner
        self.source = source
        self.recorder = recorder
        self._to_cancel: deque[int] = deque()

    def cancel(self, request_id: int) -> None:
        """Cancel a request before the next step is planned. It may be called at any time and from any thread, since
        `run` carries it out between two steps: scheduler and runner forget the request, and the source is told that
        it ended. The recorder never hears of it. Nothing happens where the id is unknown or its request has ended.
        """
        self._to_cancel.append(request_id)

    def _carry_out_cancellations(self, now_ns: int) -> None:
        while self._to_cancel:
            request = self.scheduler.cancel(self._to_cancel.popleft())
            if request is not None:
                self.runner.remove(request.id)
                self.source.finished(request, now_ns)

    def run(self, *, max_steps: float = inf, max_ns: float = inf, on_step: Callable[[int], None] | None = None) -> str:
        """Serve until the source is dry ("done"), `max_steps` are done ("steps"), or `max_ns` have passed on the
        runner's clock ("seconds"), and return which of them ended it. `on_step` gets the number of steps done."""
        scheduler, runner, source, recorder = self.scheduler, self.runner, self.source, self.recorder
        stop_ns = runner.now_ns() + max_ns
        while recorder.num_steps < max_steps and (now_ns := runner.now_ns()) < stop_ns:
            for request in source.arrivals(now_ns):
                scheduler.add(request)
                runner.add(request)
            self._carry_out_cancellations(now_ns)
            plan = scheduler.schedule(now_ns, more_to_come=source.more_to_come())
            if plan is None:
                times = [t for t in (source.next_arrival_ns(), scheduler.wake_ns()) if t is not None]
                if not times:
                    assert not scheduler.has_work(), "requests are left that no step can serve"
                    return "done"
                runner.wait_until_ns(int(min(*times, stop_ns)))
                continue
            output = runner.execute(plan)
            finished = scheduler.update(plan, output)
            recorder.step(plan, output, scheduler)
            for request in finished:
                runner.remove(request.id)
                recorder.request(request)
                source.finished(request, output.timing.end_ns)
            if on_step is not None:
                on_step(plan.step + 1)
        return "seconds" if recorder.num_steps < max_steps else "steps"
