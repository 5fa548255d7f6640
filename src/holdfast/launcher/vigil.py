"""Watching over the job by the agent that leads: reports in; lines, events and orders out. Main thread of the agent.

The shell around `HangWatch` and `StragglerWatch`. Every agent feeds its own reports into one; only a leader has it.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from holdfast.checkpoint.version import GenerationId
from holdfast.launcher import hangs
from holdfast.launcher.console import say
from holdfast.launcher.events import AnyEvent, HangEvent, StragglerEvent
from holdfast.launcher.hangs import HangLimits, HangWatch
from holdfast.launcher.stragglers import StragglerWatch
from holdfast.launcher.wire import Failure, Phase, Plan, Report


@dataclass(frozen=True)
class DumpStacks:
    """To be passed to `Leader.dump_ordered`."""

    generation: GenerationId
    number: int


@dataclass(frozen=True)
class WorkerHangs:
    """To be passed to `Leader.hung`."""

    generation: GenerationId
    failure: Failure


Order = DumpStacks | WorkerHangs


class Vigil:
    """See the module's head."""

    def __init__(self, limits: HangLimits, write: Callable[[AnyEvent], None]) -> None:
        """`write` takes the events."""
        self._hangs = HangWatch(limits)
        self._stragglers = StragglerWatch()
        self._write = write
        self._generation: GenerationId | None = None
        self._running = False

    def planned(self, plan: Plan) -> None:
        """A plan goes to all members."""
        running = plan.phase is Phase.RUN and plan.generation is not None
        if running and plan.generation != self._generation:
            self._generation = plan.generation
            num_ranks = sum(place.num_ranks for place in plan.places)
            self._hangs.began(num_ranks)
            self._stragglers.began(num_ranks)
        elif self._running and not running:
            self._hangs.ended()
        self._running = running

    def observe(self, report: Report) -> None:
        """A node reported."""
        if self._running and report.generation == self._generation:
            self._hangs.observed(report.node.host, report.pulses)
            self._stragglers.observed(report.pulses)

    def ticked(self, now: float) -> list[Order]:
        """Time has passed."""
        generation = self._generation
        if not self._running or generation is None:
            return []
        for found in self._stragglers.ticked(now):
            say(found.text)
            self._write(StragglerEvent(global_rank=found.global_rank, slow=found.slow, text=found.text))
        orders = []
        for instruction in self._hangs.ticked(now):
            order = self._carry_out(instruction, generation)
            if order is not None:
                orders.append(order)
        return orders

    def _carry_out(self, instruction: hangs.Instruction, generation: GenerationId) -> Order | None:
        match instruction:
            case hangs.OrderDump(number):
                self._write(HangEvent(change="dump", text=f"dump {number} of all stacks"))
                return DumpStacks(generation, number)
            case hangs.Suspected(first, _, text):
                say(f"warning: {text}; stacks/ in the run directory shows what all ranks are at")
                self._write(self._event("suspected", first.global_rank, first.step, text))
            case hangs.Resumed(text):
                say(text)
                self._write(HangEvent(change="resumed", text=text))
            case hangs.Hung(first, host, text):
                self._write(self._event("hung", first.global_rank, first.step, text))
                failure = Failure(
                    host=host,
                    global_rank=first.global_rank,
                    local_rank=first.local_rank,
                    pid=first.pid,
                    exit_code=0,
                    message=text,
                    step=first.step,
                    time_s=time.time(),
                )
                return WorkerHangs(generation, failure)
        return None

    def _event(self, change: str, rank: int, step: int, text: str) -> HangEvent:
        return HangEvent(change=change, global_rank=rank, step=step, text=text)
