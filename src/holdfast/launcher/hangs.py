"""Whether a job hangs, who stopped first, and whether only a restart helps. Pure: pulses and time in, instructions out.

Rules
-----
1. A job is *silent* while no rank gives a sign of life (beats: see `holdfast.runtime.beats`). Ranks that wait for one
   that evaluates or saves are silent too, so it takes all of them. A rank in a `session.section` is not silent. Before
   its Session a rank's start is its sign. Where no rank has a Session open nobody knows whether beats are to come, or
   to come again: then silent is a job in which no rank worked (rule 3b tells who does, in stretches of
   `between_dumps_s`). The exception is a job whose last generation ended within a Session: it is about to open one.
2. Past `limit`, ten times the median step and at least `least_limit_s` (before every rank has finished two steps of the
   generation: `first_limit_s`), the job is *suspected*: all ranks write their stacks, and the one that stopped first is
   named, with a warning. The one that stopped first has the lowest step (one that is still to enter its Session comes
   before all); among equals, the fewest signs of life since its boundary (a rank that waits in the backward pass has
   shown its forward pass); among these, the oldest one.
3. The job is restarted only where every rank has restored its state in a Session and none has left it, and only when
   a. the silence has lasted `hang_timeout_s` (never less than the limit), or
   b. two dumps at least `between_dumps_s` apart show the same stacks on every rank, and between them no rank used CPU
      (more than `idle_share` of the time, what it has started included), did I/O (more than `idle_bytes`) or woke its
      main thread (more than `idle_switches_per_s`): not even a slow disk, a stream or a child is at work.
4. A rank that has been in state T (stopped), or D without a moment of running, for `stuck_after_s` needs no silence of
   the others and no limit. Stacks take seconds to write and to read, so they are asked for `dump_ahead_s` before: then
   the restart waits for nothing. Should the rank go on meanwhile nobody is told, for nothing was wrong yet. For a rank
   in state T less than rule 3 asks is enough, because no storage, however slow, stops a process: every rank has opened
   its Session, or all are on their way there and nobody has finished a step, left or ended, so that nothing but the way
   is lost. That there is a Session on the way is known from a rank that has entered it, or from the last generation.
   A script without one is never restarted, nor one that has left it behind.
5. A new sign of life ends the suspicion.

States of a generation: QUIET -> DUMPING (a dump is ordered) -> SUSPECTED (it is there) -> DUMPING ... and OVER once a
restart was asked for. A leader that takes over begins with QUIET: it costs the time of one suspicion.
"""

from __future__ import annotations

import enum
import statistics
from collections import deque
from dataclasses import dataclass

from holdfast.launcher.wire import Pulse
from holdfast.snapshot.control import Phase

_KEPT_STEPS = 200
"""Step times of which the median is taken."""
_ENDED = ("Z", "X")
"""States of a process that has ended, and was not waited for yet."""


@dataclass(frozen=True, kw_only=True)
class HangLimits:
    """Numbers of the rules; times in seconds."""

    hang_timeout_s: float = 600.0
    least_limit_s: float = 60.0
    first_limit_s: float = 600.0
    median_steps: float = 10.0
    stuck_after_s: float = 10.0
    dump_ahead_s: float = 3.0
    between_dumps_s: float = 30.0
    answer_s: float = 5.0
    """How long a dump may take; a rank that has not answered by then is taken as it is."""
    idle_share: float = 0.01
    idle_bytes: int = 64 << 10
    idle_switches_per_s: float = 0.2

    def __post_init__(self) -> None:
        """Check the values."""
        if self.hang_timeout_s <= 0:
            raise ValueError(f"a hang timeout of {self.hang_timeout_s} s: expected more than 0")


@dataclass(frozen=True)
class OrderDump:
    """All ranks write their stacks; pulses with this `dump` answer it."""

    number: int


@dataclass(frozen=True)
class Suspected:
    """For people: the job is silent, or a rank stands still; `first` stopped first."""

    first: Pulse
    host: str
    text: str


@dataclass(frozen=True)
class Resumed:
    """It goes on after all."""

    text: str


@dataclass(frozen=True)
class Hung:
    """Only a restart helps."""

    first: Pulse
    host: str
    text: str


Instruction = OrderDump | Suspected | Resumed | Hung


class _State(enum.Enum):
    QUIET = "quiet"
    DUMPING = "dumping"
    SUSPECTED = "suspected"
    OVER = "over"


@dataclass
class _Dump:
    """One dump while it is compared with the next."""

    number: int
    ordered: float
    before: dict[int, Pulse]
    """Pulses at the order: CPU and I/O up to here belong to the time before it."""
    answered: float = 0.0
    after: dict[int, Pulse] | None = None
    """Pulses once all ranks had answered: CPU and I/O from here on belong to the time after it."""


@dataclass
class _Effort:
    """What one rank does where there are no beats."""

    begin: Pulse
    begun: float
    """Of the stretch that is judged next."""
    worked: float
    """End of the newest stretch in which it worked; at first when it was first looked at."""


class HangWatch:
    """See the module's head. One per leader's agent, used by one thread; `now` never goes back."""

    def __init__(self, limits: HangLimits) -> None:
        self._limits = limits
        self._num_ranks = 0
        self._pulses: dict[int, Pulse] = {}
        self._hosts: dict[int, str] = {}
        self._efforts: dict[int, _Effort] = {}
        self._now = 0.0
        self._expected = False
        """The last generation of which something is known ended within a Session."""
        self._steps: deque[float] = deque(maxlen=_KEPT_STEPS)
        self._state = _State.OVER
        self._newest: _Dump | None = None
        self._before: _Dump | None = None
        self._next_dump = 0.0
        self._wait = limits.between_dumps_s
        self._number = 0
        self._stuck: int | None = None
        self._told = False

    # --- events

    def began(self, num_ranks: int) -> None:
        """A generation of so many ranks begins; of the one before counts only whether it ended within a Session.

        A rank that fails leaves its Session, so one that has not left it is enough.
        """
        phases = [pulse.phase for pulse in self._pulses.values()]
        if phases and min(phases) >= Phase.RESTORED:
            self._expected = any(phase != Phase.CLOSED for phase in phases)
        self._num_ranks = num_ranks
        self._pulses.clear()
        self._efforts.clear()
        self._hosts.clear()
        self._steps.clear()
        self._number = 0
        self._quiet()

    def ended(self) -> None:
        """The generation ends, or the job is asked to stop: nobody is to be restarted now."""
        self._state = _State.OVER

    def observed(self, host: str, pulses: tuple[Pulse, ...]) -> None:
        """What one node's agent has seen of its workers."""
        for pulse in pulses:
            before = self._pulses.get(pulse.global_rank)
            if pulse.step_s > 0 and (before is None or before.step != pulse.step):
                self._steps.append(pulse.step_s)
            self._pulses[pulse.global_rank] = pulse
            self._hosts[pulse.global_rank] = host

    def ticked(self, now: float) -> list[Instruction]:
        """Time has passed: about every heartbeat."""
        if self._state is _State.OVER or len(self._pulses) < self._num_ranks:
            return []
        self._now = now
        self._follow_efforts(now)
        stuck = self._find_stuck(ahead_s=self._limits.dump_ahead_s)
        if stuck is None and self.silent_s < self.limit_s:
            return self._calm()
        if self._state is _State.QUIET:
            self._stuck = stuck.global_rank if stuck is not None else None
            return self._order(now)
        if self._state is _State.DUMPING:
            return self._dumping(now)
        return self._suspected(now)

    # --- what is seen

    @property
    def silent_s(self) -> float:
        """How long no rank has given a sign of life, or worked where there are no such signs."""
        if any(pulse.exempt for pulse in self._pulses.values()):
            return 0.0
        if not self._beats:
            return min((self._now - effort.worked for effort in self._efforts.values()), default=0.0)
        return min((pulse.silent_s for pulse in self._pulses.values()), default=0.0)

    @property
    def _beats(self) -> bool:
        """Whether signs of life are to be expected: a Session is open somewhere, or one is about to be."""
        pulses = self._pulses.values()
        left = any(pulse.phase == Phase.CLOSED or pulse.state in _ENDED for pulse in pulses)
        return any(_is_inside(pulse) for pulse in pulses) or (self._expected and not left)

    def _follow_efforts(self, now: float) -> None:
        for rank, pulse in self._pulses.items():
            effort = self._efforts.setdefault(rank, _Effort(pulse, now, now))
            if now - effort.begun >= self._limits.between_dumps_s:
                if not self._rested(effort.begin, pulse, now - effort.begun):
                    effort.worked = now
                effort.begin, effort.begun = pulse, now

    @property
    def limit_s(self) -> float:
        """Silence from which on the job is suspected."""
        limits = self._limits
        if not self._warm:
            return max(limits.first_limit_s, self._steps_limit_s)
        return max(self._steps_limit_s, min(limits.least_limit_s, limits.hang_timeout_s))

    @property
    def _steps_limit_s(self) -> float:
        return self._limits.median_steps * statistics.median(self._steps) if self._steps else 0.0

    @property
    def _warm(self) -> bool:
        return self._beats and all(pulse.steps_done >= 2 for pulse in self._pulses.values())

    @property
    def _restartable(self) -> bool:
        """Every rank is in a Session that has its state, or will have it once a stopped rank is ended."""
        stuck = self._find_stuck()
        stopped = stuck is not None and stuck.state == "T"
        least = Phase.OPENED if stopped else Phase.RESTORED
        inside = all(least <= pulse.phase < Phase.CLOSED for pulse in self._pulses.values())
        return inside or (stopped and self._on_the_way)

    @property
    def _on_the_way(self) -> bool:
        """Whether all ranks are on their way into a Session, and a restart loses nothing but the way."""
        pulses = self._pulses.values()
        session = self._expected or any(pulse.entered for pulse in pulses)
        return session and all(pulse.phase <= Phase.RESTORED and pulse.state not in _ENDED for pulse in pulses)

    def _find_stuck(self, *, ahead_s: float = 0.0) -> Pulse | None:
        """The rank that has stood still longest, where one has long enough, or will have in `ahead_s`."""
        longest = max(self._pulses.values(), key=lambda pulse: pulse.stuck_s)
        return longest if longest.stuck_s >= self._limits.stuck_after_s - ahead_s else None

    def _first(self) -> Pulse:
        """The rank that stopped first."""
        stuck = self._find_stuck()
        return stuck or min(self._suspects(), key=lambda p: (p.entered, p.step, p.inner_beats, self._last_s(p)))

    def _suspects(self) -> list[Pulse]:
        """Once steps are made, those in the Session: it is not for the others. Else whoever has not ended."""
        pulses = list(self._pulses.values())
        inside = [pulse for pulse in pulses if _is_inside(pulse)]
        if any(pulse.phase >= Phase.FIRST_STEP for pulse in inside):
            return inside
        return [pulse for pulse in pulses if pulse.state not in _ENDED] or pulses

    def _last_s(self, pulse: Pulse) -> float:
        """When it last gave a sign of life; where there are none, worked."""
        return pulse.beat_s if self._beats else self._efforts[pulse.global_rank].worked

    # --- the machine

    def _quiet(self) -> None:
        self._state, self._told, self._stuck = _State.QUIET, False, None
        self._newest = self._before = None
        self._wait = self._limits.between_dumps_s

    def _calm(self) -> list[Instruction]:
        told = self._told
        first = self._stuck
        if self._state is not _State.QUIET:
            self._quiet()
        if not told:
            return []
        who = "the job" if first is None else f"rank {first}"
        return [Resumed(f"{who} goes on")]

    def _order(self, now: float) -> list[Instruction]:
        self._state = _State.DUMPING
        self._number += 1
        self._before, self._newest = self._newest, _Dump(self._number, now, dict(self._pulses))
        return [OrderDump(self._number)]

    def _dumping(self, now: float) -> list[Instruction]:
        dump = self._newest
        assert dump is not None, "a dump was ordered"
        missing = [pulse for pulse in self._pulses.values() if pulse.dump < dump.number]
        if missing and now - dump.ordered < self._limits.answer_s:
            return []
        dump.after, dump.answered = dict(self._pulses), now
        self._state, self._next_dump = _State.SUSPECTED, now + self._wait
        self._wait *= 2
        return self._suspicion() + self._judge(now)

    def _suspected(self, now: float) -> list[Instruction]:
        out = self._suspicion() + self._judge(now)
        return out or (self._order(now) if now >= self._next_dump else [])

    def _judge(self, now: float) -> list[Instruction]:
        """Whether a restart is due."""
        reason = self._reason()
        if reason is None or not self._restartable:
            return []
        self._state = _State.OVER
        first = self._first()
        return [Hung(first, self._hosts[first.global_rank], reason)]

    def _reason(self) -> str | None:
        stuck = self._find_stuck()
        if stuck is not None:
            return f"in state {stuck.state} for {stuck.stuck_s:.0f} s"
        first = self._first()
        least = self._limits.hang_timeout_s if self._warm else max(self.limit_s, self._limits.hang_timeout_s)
        if self.silent_s >= max(self.limit_s, least):
            return f"no sign of life for {self.silent_s:.0f} s, {first.frame}"
        if self._same():
            return f"no sign of life for {self.silent_s:.0f} s and all ranks idle, {first.frame}"
        return None

    def _same(self) -> bool:
        """Whether the last two dumps show the same, and nobody worked in between."""
        old, new = self._before, self._newest
        if old is None or new is None or old.after is None or new.after is None:
            return False
        if new.ordered - old.answered < self._limits.between_dumps_s:
            return False
        return all(self._idle(old, new, rank) for rank in self._pulses)

    def _idle(self, old: _Dump, new: _Dump, rank: int) -> bool:
        assert old.after is not None, "the dump was answered"
        assert new.after is not None, "the dump was answered"
        if rank not in old.after or rank not in new.before or rank not in new.after:
            return False
        begin, end = old.after[rank], new.before[rank]
        if (begin.dump, new.after[rank].dump) != (old.number, new.number) or begin.stack != new.after[rank].stack:
            return False
        return self._rested(begin, end, new.ordered - old.answered)

    def _rested(self, begin: Pulse, end: Pulse, seconds: float) -> bool:
        """Whether a rank did nothing between two pulses that are `seconds` apart."""
        return (
            end.cpu_s - begin.cpu_s <= self._limits.idle_share * seconds
            and end.io_bytes - begin.io_bytes <= self._limits.idle_bytes
            and end.switches - begin.switches <= self._limits.idle_switches_per_s * seconds
        )

    def _suspicion(self) -> list[Instruction]:
        """What people are told, once there is something: stacks may have been asked for ahead of it."""
        if self._told or (self._find_stuck() is None and self.silent_s < self.limit_s):
            return []
        self._told = True
        first = self._first()
        return [Suspected(first, self._hosts[first.global_rank], self._describe(first))]

    def _describe(self, first: Pulse) -> str:
        where = f"rank {first.global_rank} ({self._hosts[first.global_rank]}, pid {first.pid})"
        if first.stuck_s >= self._limits.stuck_after_s:
            stays = first.state == "T" and not self._restartable
            left = f"; it is left alone: end it, or kill -CONT {first.pid}" if stays else ""
            return f"{where} has been in state {first.state} for {first.stuck_s:.0f} s{left}"
        if not self._beats:
            return f"no rank has used CPU or done I/O for {self.silent_s:.0f} s; {where} stopped first: {first.frame}"
        where_to = f"at step {first.step}" if first.entered else "before its Session"
        silence = f"no sign of life from any rank for {self.silent_s:.0f} s"
        return f"{silence}; {where} stopped first, {where_to}: {first.frame}"


def _is_inside(pulse: Pulse) -> bool:
    """Whether a rank has entered its Session and not left it; it may have ended without that."""
    return pulse.entered and pulse.phase != Phase.CLOSED
