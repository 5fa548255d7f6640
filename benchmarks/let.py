"""Does late-to-early guidance pay: ``python benchmarks/let.py --resume runs/let-benchmark``.

Plain and guided training of the same student, from the same weights, with the same batches in the same order, on the
source of Python's standard library as tokens of a byte-level BPE. Loss is that of text which no model was trained on.

* The learning rate of each arm is tuned on tuning seeds, on a grid of factors of two that grows while its best value is
  at an end; so is the weight, for the small student. Then everything is frozen, and the pairs that are reported run on
  seeds that were not used before.
* The learning rate is constant after the warm-up, so each run's beginning is the run of a shorter length.
* steps: where the guided run reaches the plain run's final loss, over the length of the run. Where it ends above that
  loss, the inverse of where the plain run reaches the guided one's.
* time: the same in CPU seconds of one thread. The two runs of a pair take turns step by step, so that what else the
  machine does slows both alike. Once without and once with the seconds that the teacher's own training took.
* Controls and ablations use the guided arm's frozen setting but for what they name, and the pairs' plain runs.
* Cost: the CPU time of a guided step over that of a plain one, minus one, beside 2 N_teacher / 6 N_student.

Each finished run is a file in the folder given with ``--resume``; an interrupted campaign goes on from there, and
``--report`` shows what there is. Bars: at most 0.75 of the steps and 0.85 of the time, the whole interval below 1; the
cost within 1.5 of the bound for the largest model, where matrix products take the time; nothing after stop_step.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from let_runs import (
    Arm,
    Curve,
    Guidance,
    Missing,
    Pretraining,
    Scale,
    Size,
    Store,
    Trainer,
    loss_of,
    optimizer_of,
    update,
)
from measure import Bar, Estimate, as_json, estimate, exit_code, keep, lines_of, options_of, ratios, table

MOST_GROWTHS = 3
"""How often the grid of learning rates may grow."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A campaign."""

    scale: Scale
    students: Mapping[str, Size]
    guidance: Guidance
    """All of the setting but the weight."""
    weights: Sequence[float]
    """Tried on the tuning seeds."""
    teachers: Mapping[str, Size]
    """Of the ablation; besides that of `guidance`."""
    lrs: Sequence[float]
    """Where the grid begins, ascending."""
    tuning_seeds: Sequence[int]
    seeds: Sequence[int]
    ablation_seeds: Sequence[int]
    """Some of `seeds`: those have plain runs."""
    cost: tuple[Size, Size]
    """A student and a teacher whose time is that of matrix products."""
    cost_rounds: int
    largest_rounds: int
    """Of `cost`, which carries the bars: its steps jitter by as much as guidance costs."""


TEACHER = Pretraining(size=Size(width=64, layers=2, heads=2), steps=3000)

FULL = Plan(
    scale=Scale(
        text_bytes=10 << 20, vocabulary=512, batch=8, context=64, steps=240, warmup=30, evaluate_every=20,
        validation=64, teacher_lr=3e-3,
    ),
    students={"small": Size(width=96, layers=4, heads=4), "large": Size(width=128, layers=6, heads=4)},
    guidance=Guidance(teacher=TEACHER),
    teachers={"1/4 of it": Size(width=32, layers=2, heads=2), "4 times it": Size(width=96, layers=4, heads=4)},
    weights=(0.1, 0.3, 1.0, 3.0),
    lrs=(1e-3, 2e-3, 4e-3),
    tuning_seeds=(100, 101),
    seeds=(1, 2, 3, 4, 5),
    ablation_seeds=(1, 2, 3),
    cost=(Size(width=512, layers=8, heads=8), Size(width=256, layers=3, heads=4)),
    cost_rounds=60,
    largest_rounds=480,
)  # fmt: skip

QUICK = replace(
    FULL,
    scale=replace(FULL.scale, text_bytes=1 << 20, vocabulary=288, batch=4, context=32, steps=20, warmup=4,
                  evaluate_every=5, validation=8),
    students={"small": Size(width=32, layers=2, heads=2), "large": Size(width=48, layers=3, heads=2)},
    guidance=replace(FULL.guidance, teacher=Pretraining(size=Size(width=16, layers=1, heads=1), steps=40)),
    teachers={"4 times it": Size(width=32, layers=1, heads=1)},
    weights=(0.1, 1.0),
    lrs=(4e-3, 8e-3, 16e-3),
    tuning_seeds=(100,),
    ablation_seeds=(1, 2),
    cost=(Size(width=128, layers=2, heads=2), Size(width=64, layers=1, heads=1)),
    cost_rounds=7,
    largest_rounds=7,
)  # fmt: skip


@dataclass(frozen=True)
class Target(Bar):
    """An upper limit for a median whose interval must stay below 1."""

    @property
    def met(self) -> bool:
        return self.value.median <= self.limit and self.value.high < 1


# --- what is trained


def tuned(trainer: Trainer, plan: Plan, student: str, guidance: Guidance | None) -> float:
    """The learning rate with the least mean final loss over the tuning seeds."""
    finals: dict[float, float] = {}
    grid = list(plan.lrs)
    for _ in range(MOST_GROWTHS + 1):
        for lr in grid:
            if lr not in finals:
                finals[lr] = on_tuning_seeds(trainer, plan, student, lr, guidance)
        best = min(finals, key=finals.__getitem__)
        if best not in (grid[0], grid[-1]):
            break
        grid = [best / 2, *grid] if best == grid[0] else [*grid, best * 2]
    return best


def tuned_weight(trainer: Trainer, plan: Plan, lr: float) -> float:
    """The weight with the least, at the plain arm's learning rate; taken for both students."""
    finals = {
        weight: on_tuning_seeds(trainer, plan, "small", lr, replace(plan.guidance, weight=weight))
        for weight in plan.weights
    }
    return min(finals, key=finals.__getitem__)


def on_tuning_seeds(trainer: Trainer, plan: Plan, student: str, lr: float, guidance: Guidance | None) -> float:
    """Mean final loss of one setting."""
    arm = Arm(size=plan.students[student], lr=lr, guidance=guidance)
    loss = statistics.fmean(trainer.curves(f"tune-{student}", [arm], seed)[0].final for seed in plan.tuning_seeds)
    weight = f"weight {guidance.weight:g}" if guidance else "plain"
    say(f"tuning {student}, {weight}, learning rate {lr:g}: {loss:.4f}")
    return loss


@dataclass(frozen=True)
class Pairs:
    """What the runs that are reported gave for one student, pair by pair."""

    guidance: Guidance
    """As it was frozen."""
    plain_lr: float
    guided_lr: float
    plain: list[Curve]
    guided: list[Curve]


def pairs_of(trainer: Trainer, plan: Plan, student: str) -> Pairs:
    """Tune both arms, freeze, then train the pairs."""
    plain_lr = tuned(trainer, plan, student, None)
    weight = tuned_weight(trainer, plan, tuned(trainer, plan, "small", None))
    guidance = replace(plan.guidance, weight=weight)
    guided_lr = tuned(trainer, plan, student, guidance)
    plain = Arm(size=plan.students[student], lr=plain_lr)
    guided = replace(plain, lr=guided_lr, guidance=guidance)
    curves = []
    for seed in plan.seeds:
        curves.append(trainer.curves(f"pair-{student}", [plain, guided], seed))
        say(f"{student}, seed {seed}: plain {curves[-1][0].final:.4f}, guided {curves[-1][1].final:.4f}")
    return Pairs(guidance, plain_lr, guided_lr, [pair[0] for pair in curves], [pair[1] for pair in curves])


def controls_of(usual: Guidance) -> dict[str, Guidance]:
    """Teachers that know nothing, or nothing of the token, or another text."""
    return {
        "random weights": replace(usual, teacher=replace(usual.teacher, steps=0)),
        "states shuffled over tokens": replace(usual, shuffled=True),
        "teacher of another text": replace(usual, teacher=replace(usual.teacher, part="other")),
    }


def ablations_of(usual: Guidance, plan: Plan) -> dict[str, Guidance]:
    """One thing changed at a time."""
    last = plan.students["small"].layers - 1
    changed = {
        "layer blocks.0": replace(usual, layer="blocks.0"),
        f"layer blocks.{last} (last to last)": replace(usual, layer=f"blocks.{last}"),
        "teacher's first block (middle to early)": replace(usual, teacher_layer="blocks.0"),
        **{f"weight {weight}": replace(usual, weight=weight) for weight in (0.03, 0.1, 0.3, 1.0)},
        **{f"stop {stop}": replace(usual, stop=stop) for stop in (0.2, 0.5, 1.0)},
        "learned projection": replace(usual, match="learned"),
        "logits (SALT, RKD)": replace(usual, objective="logits"),
    }
    for name, size in plan.teachers.items():
        changed[f"teacher {name}"] = replace(usual, teacher=replace(usual.teacher, size=size))
    return {name: guidance for name, guidance in changed.items() if guidance != usual}


# --- what it says


def crossing(curve: Curve, loss: float, along: Sequence[float]) -> float | None:
    """Where a curve first comes down to a loss, in units of `along`, between evaluations on a straight line."""
    for at, found in enumerate(curve.losses):
        if found > loss:
            continue
        if at == 0:
            return along[0]
        before = curve.losses[at - 1]
        return along[at - 1] + (along[at] - along[at - 1]) * (before - loss) / (before - found)
    return None


def steps_ratio(plain: Curve, guided: Curve) -> float:
    """See the head of this module."""
    reached = crossing(guided, plain.final, guided.steps)
    if reached is not None:
        return reached / plain.steps[-1]
    by_plain = crossing(plain, guided.final, plain.steps)
    assert by_plain is not None
    return guided.steps[-1] / by_plain


def time_ratio(plain: Curve, guided: Curve, teacher_s: float = 0.0) -> float:
    """The same in seconds; those of the teacher's training are spent before the guided run begins."""
    reached = crossing(guided, plain.final, guided.seconds)
    if reached is not None:
        return (teacher_s + reached) / plain.seconds[-1]
    by_plain = crossing(plain, guided.final, plain.seconds)
    assert by_plain is not None
    return (teacher_s + guided.seconds[-1]) / by_plain


def judge(pairs: Pairs, teacher_s: float) -> dict[str, Estimate]:
    """The ratios of one student."""
    both = list(zip(pairs.plain, pairs.guided, strict=True))
    return {
        "final loss": estimate(ratios([guided.final for _, guided in both], [plain.final for plain, _ in both])),
        "steps": estimate([steps_ratio(*pair) for pair in both]),
        "time": estimate([time_ratio(*pair) for pair in both]),
        "time with the teacher's": estimate([time_ratio(*pair, teacher_s) for pair in both]),
    }


@dataclass(frozen=True)
class Variant:
    """One control or ablation beside the plain runs of the same seeds."""

    name: str
    difference: Estimate
    """Final loss minus that of the plain run, nats per token."""
    steps: Estimate


def variants(
    trainer: Trainer, plan: Plan, pairs: Pairs, named: Mapping[str, Guidance], seeds: Sequence[int]
) -> Iterator[Variant]:
    """The frozen setting, then each variant of it, trained on the small student with some of the seeds."""
    plain, guided = (dict(zip(plan.seeds, curves, strict=True)) for curves in (pairs.plain, pairs.guided))

    def beside_plain(name: str, curves: Mapping[int, Curve]) -> Variant:
        differences = [curve.final - plain[seed].final for seed, curve in curves.items()]
        steps = [steps_ratio(plain[seed], curve) for seed, curve in curves.items()]
        return Variant(name, estimate(differences), estimate(steps))

    yield beside_plain("as frozen", {seed: guided[seed] for seed in seeds})
    for name, guidance in named.items():
        arm = Arm(size=plan.students["small"], lr=pairs.guided_lr, guidance=guidance)
        try:
            variant = beside_plain(name, {seed: trainer.curves("variant", [arm], seed)[0] for seed in seeds})
        except Missing:
            say(f"{name}: not finished")
            continue
        say(f"{name}: final loss {variant.difference} from that of plain")
        yield variant


# --- what it costs


@dataclass(frozen=True)
class Cost:
    """CPU time of a guided step over that of a plain one."""

    name: str
    bound: float
    """2 N_teacher / 6 N_student."""
    guided: Estimate
    after: Estimate
    """The same from stop_step on."""
    over_bound: Estimate


def cost_of(trainer: Trainer, name: str, student: Size, teacher: Pretraining, rounds: int) -> Cost:
    """Time plain and guided steps in turns, before stop_step and (at most 90) after it."""
    key = [asdict(trainer.scale), asdict(student), asdict(teacher), rounds]
    taken = trainer.store.get(f"cost-{name}", key)
    if taken is None:
        taken = _timed(trainer, student, teacher, rounds)
        trainer.store.put(f"cost-{name}", key, taken)
    guided, after = (ratios(taken[phase]["guided"], taken[phase]["plain"]) for phase in ("during", "after"))
    bound = 2 * teacher.size.parameters / (6 * student.parameters)
    over_bound = estimate([(ratio - 1) / bound for ratio in guided])
    return Cost(name, bound, estimate(guided), estimate(after), over_bound)


def _timed(trainer: Trainer, student: Size, teacher: Pretraining, rounds: int) -> dict[str, dict[str, list[float]]]:
    """CPU seconds of each step. The two models take turns, and take turns in being first."""
    models = {name: trainer.model(student, 1) for name in ("plain", "guided")}
    optimizers = {name: optimizer_of(model, 1e-4) for name, model in models.items()}
    warm_up = 2
    stop_step = warm_up + rounds
    guide = trainer.guide(models["guided"], Guidance(teacher=teacher), stop_step)
    taken: dict[str, dict[str, list[float]]] = {phase: {"plain": [], "guided": []} for phase in ("during", "after")}
    for step in range(stop_step + min(rounds, 90)):
        batch = trainer.batch(trainer.text.train, 0, step, trainer.scale.batch)
        for name in ("plain", "guided") if step % 2 else ("guided", "plain"):
            began = time.process_time()
            loss = loss_of(models[name], batch)
            update(guide(loss, step) if name == "guided" else loss, optimizers[name])
            if step >= warm_up:
                taken["during" if step < stop_step else "after"][name].append(time.process_time() - began)
    return taken


# --- the campaign


def say(line: str) -> None:
    """Progress, for a person who waits."""
    print(line, file=sys.stderr, flush=True)


def campaign(trainer: Trainer, plan: Plan) -> tuple[dict[str, object], list[Bar]]:
    """All of it, the most important first. With a store for reading only: what is there."""
    missing: list[str] = []
    results: dict[str, object] = {"plan": asdict(plan), "missing": missing}
    bars: list[Bar] = []
    found: dict[str, Pairs] = {}

    def stage(name: str, run: Callable[[], object]) -> None:
        try:
            results[name] = run()
        except Missing as error:
            missing.append(name)
            print(f"\n{name}: not finished ({error} is missing)")

    def students(name: str) -> dict[str, object]:
        teacher, _ = trainer.teacher(plan.guidance.teacher)
        found[name] = pairs_of(trainer, plan, name)
        judged = judge(found[name], teacher["seconds"])
        show_pairs(name, plan, found[name], judged, teacher)
        bars.append(Target(f"{name}: steps to the plain run's final loss", judged["steps"], 0.75))
        bars.append(Target(f"{name}: time to it", judged["time"], 0.85))
        return {"pairs": asdict(found[name]), "ratios": {key: asdict(value) for key, value in judged.items()},
                "teacher": teacher}  # fmt: skip

    def beside(named: Callable[[Guidance], Mapping[str, Guidance]], seeds: Sequence[int]) -> list[dict[str, object]]:
        if "small" not in found:
            raise Missing("the small student")
        wanted = named(found["small"].guidance)
        made = list(variants(trainer, plan, found["small"], wanted, seeds))
        show_variants(made, len(seeds))
        if len(made) <= len(wanted):  # besides them stands the frozen setting
            missing.append("some of the variants")
        return [asdict(variant) for variant in made]

    def costs() -> list[dict[str, object]]:
        sizes = {name: (size, plan.guidance.teacher) for name, size in plan.students.items()}
        sizes["largest"] = (plan.cost[0], Pretraining(size=plan.cost[1], steps=0))
        rounds = dict.fromkeys(plan.students, plan.cost_rounds) | {"largest": plan.largest_rounds}
        made = [cost_of(trainer, name, *pair, rounds[name]) for name, pair in sizes.items()]
        show_costs(made)
        bars.append(Bar("cost over its bound of FLOPs, largest", made[-1].over_bound, 1.5))
        bars.append(Bar("step time after stop_step over plain, largest", made[-1].after, 1.02))
        return [asdict(cost) for cost in made]

    stage("small", lambda: students("small"))
    stage("controls", lambda: beside(controls_of, plan.seeds))
    stage("ablations", lambda: beside(lambda usual: ablations_of(usual, plan), plan.ablation_seeds))
    stage("large", lambda: students("large"))
    stage("cost", costs)
    return results, bars


def show_pairs(
    name: str, plan: Plan, pairs: Pairs, judged: Mapping[str, Estimate], teacher: Mapping[str, float]
) -> None:
    student, size = plan.students[name].parameters / 1e6, plan.guidance.teacher.size.parameters / 1e6
    print(
        f"\n{name}: {student:.2f} M parameters in blocks, {len(pairs.plain)} pairs of {plan.scale.steps} steps, weight "
        f"{pairs.guidance.weight:g}; teacher {size:.2f} M, loss {teacher['loss']:.3f}, {teacher['seconds']:.0f} CPU s"
    )
    rows = []
    for label, lr, curves in (("plain", pairs.plain_lr, pairs.plain), ("guided", pairs.guided_lr, pairs.guided)):
        finals = estimate([curve.final for curve in curves])
        seconds = estimate([curve.seconds[-1] for curve in curves])
        rows.append([label, f"{lr:g}", str(finals), str(seconds)])
    print(table(["arm", "learning rate", "final loss", "CPU s"], rows))
    print(table(["guided over plain", "median [95 % interval]"], [[key, str(value)] for key, value in judged.items()]))


def show_variants(made: Sequence[Variant], seeds: int) -> None:
    print()
    rows = [[variant.name, str(variant.difference), str(variant.steps)] for variant in made]
    print(table([f"small student, {seeds} seeds", "final loss minus plain's", "steps over plain's"], rows))


def show_costs(made: Sequence[Cost]) -> None:
    print()
    rows = [[cost.name, f"{cost.bound:.3f}", str(cost.guided), str(cost.over_bound), str(cost.after)] for cost in made]
    print(table(["student", "bound", "step time, guided over plain", "(that - 1) over bound", "after stop_step"], rows))


def main() -> int:
    parser = options_of(__doc__, quick="tiny models and few steps; the bars are not judged")
    parser.add_argument("--resume", type=Path, help="folder of finished runs; default: a temporary one")
    parser.add_argument("--report", action="store_true", help="train nothing, show what --resume holds")
    args = parser.parse_args()
    if args.report and args.resume is None:
        parser.error("--report needs --resume")
    torch.set_num_threads(1)
    plan = QUICK if args.quick else FULL
    with tempfile.TemporaryDirectory(prefix="let-") as fresh:
        trainer = Trainer(plan.scale, Store(args.resume or Path(fresh), only_read=args.report))
        results, bars = campaign(trainer, plan)
    keep(as_json(results, bars, quick=args.quick), args.json)
    if args.json != "-":
        print("\n" + lines_of(bars, quick=args.quick))
    return exit_code(bars, quick=args.quick, whole=not results["missing"])


if __name__ == "__main__":
    sys.exit(main())
