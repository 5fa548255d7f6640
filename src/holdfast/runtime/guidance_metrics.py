"""What a step of guidance did and cost."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor


class Meter:
    """The newest value of the term, and the teacher's share of the time between two steps.

    On CUDA the teacher's time is taken by events and read when it is asked for; elsewhere by the clock.
    """

    def __init__(self) -> None:
        self.value: Tensor | None = None
        self.weight = 0.0
        self._step: int | None = None
        self._began_s = 0.0
        self._teacher_s = 0.0
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self._last: tuple[float, float, list[tuple[torch.cuda.Event, torch.cuda.Event]]] | None = None
        """Seconds of the last whole step, the teacher's by the clock, and its events, not read yet."""

    @contextlib.contextmanager
    def teacher(self, device: torch.device) -> Iterator[None]:
        """Around one forward of the teacher."""
        if device.type != "cuda":
            began = time.perf_counter()
            yield
            self._teacher_s += time.perf_counter() - began
            return
        event: Callable[..., torch.cuda.Event] = torch.cuda.Event
        pair = (event(enable_timing=True), event(enable_timing=True))
        stream = torch.cuda.current_stream(device)
        pair[0].record(stream)
        yield
        pair[1].record(stream)
        self._events.append(pair)

    def at(self, step: int) -> None:
        """A term was computed at `step`; at the first one of a step the step before it is over."""
        if step == self._step:
            return
        now = time.perf_counter()
        if self._step is not None:
            self._last = (now - self._began_s, self._teacher_s, self._events)
        self._step, self._began_s, self._teacher_s, self._events = step, now, 0.0, []

    def stop(self) -> None:
        """Guidance is over: nothing is pulled and nothing is spent."""
        self.value, self.weight, self._last, self._events = None, 0.0, None, []

    def share(self) -> float:
        """The teacher's part of the last whole step, 0.0 to 1.0; 0.0 before there is one."""
        if self._last is None:
            return 0.0
        whole_s, teacher_s, events = self._last
        for began, ended in events:
            ended.synchronize()
            teacher_s += began.elapsed_time(ended) / 1000
        self._last = (whole_s, teacher_s, [])
        return min(1.0, teacher_s / whole_s) if whole_s > 0 else 0.0
