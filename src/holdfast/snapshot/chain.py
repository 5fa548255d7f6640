"""Which version a generation starts from: a pure choice over inventories and storage, with a reason for each refusal.

The *chain* is the history that counts. It begins at the newest generation that anybody knows of and follows parents:
all versions of that generation, of its parent's generation those up to the parent, and so on. What a generation made
after the point from which its successor started is off the chain, in memory and in storage.

Candidates are

- versions in memory on the chain of which every image (one per rank of the world that wrote it) is clean somewhere, or
  can be decoded from what the living nodes hold (`holdfast.snapshot.recovery`), if the memory belongs to the history of
  the checkpoint directory as it is now (after ``rm -rf`` it does not). An incarnation that runs goes on from its own
  memory, whatever happened to the directory meanwhile;
- steps in storage, unless their generation is known and they are off its chain.

The newest step wins, memory on ties. ``resume`` decides an incarnation's first generation only. A candidate that failed
its checks is excluded by the caller, who then asks again.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from holdfast.checkpoint.version import GenerationId, Version
from holdfast.snapshot.coding import Rebuild
from holdfast.snapshot.messages import Inventory
from holdfast.snapshot.records import CleanImage, Member, Parentage
from holdfast.snapshot.recovery import Irretrievable, Restoration, restoration
from holdfast.snapshot.reports import Pin


@dataclass(frozen=True, kw_only=True)
class StoredStep:
    """A complete step directory (its root exists)."""

    step: int
    version: Version
    path: str
    tag: str | None = None


@dataclass(frozen=True, kw_only=True)
class ChainQuestion:
    """Everything the choice depends on."""

    generation: GenerationId
    """The one that starts."""
    fresh: bool
    """First generation of its incarnation: `resume` applies; later ones take the newest."""
    resume: str
    """auto, never, step:N, or path:TAG-OR-PATH."""
    inventories: tuple[Inventory, ...]
    stored: tuple[StoredStep, ...]
    """Complete steps in the checkpoint directory; for a path outside of it, the shell adds that one."""
    history: str | None
    """History id of the checkpoint directory now; None where there is no directory or it has none yet."""
    excluded: tuple[Version, ...] = ()
    """Versions in memory that failed their checks (RestoreFailed)."""
    bad_images: tuple[tuple[Version, int], ...] = ()
    """Images (version, global rank) that failed theirs: as if they were lost, so decoded where that can be done."""
    excluded_paths: tuple[str, ...] = ()
    """Step directories that failed theirs."""


@dataclass(frozen=True, kw_only=True)
class Rejected:
    """A candidate that was not taken, and why."""

    candidate: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class Choice:
    """What the generation starts from."""

    tier: str
    """memory, storage, none; error where `resume` names something that is not there (`reason` says it)."""
    version: Version | None = None
    step: int = 0
    path: str | None = None
    """Step directory, where the tier is storage."""
    steps_lost: int = 0
    reason: str = ""
    rejected: tuple[Rejected, ...] = ()
    rebuilds: tuple[Rebuild, ...] = ()
    """The lost images of `version`, where the tier is memory, and what each is decoded from."""
    protected: Version | None = None
    """The version whose slots and parity stay until one of the new generation is protected: `version` itself where it
    survives a further loss, else the newest other one that does (see `insurance`)."""
    exposed: bool = False
    """`version` lacks an image already, or would not survive the loss of a node: a version of the restored state that
    is as well protected as others is wanted before any step is done."""


@dataclass(frozen=True)
class Chain:
    """How far each generation of the history that counts goes: the last step that is on the chain, None for no end."""

    ends: dict[GenerationId, int | None]
    known: frozenset[GenerationId]
    """Every generation that any record or image names."""

    def refusal(self, version: Version) -> str | None:
        """Why `version` is not on the chain, None where it is."""
        if version.generation not in self.ends:
            return f"generation {version.generation} is off the chain: a later one did not start from it"
        end = self.ends[version.generation]
        if end is not None and version.step > end:
            return f"step {version.step} is off the chain: the next generation started from step {end}"
        return None


def age(generation: GenerationId) -> tuple[int, int, str]:
    """Sorts generations by age; the nonce only makes the order total."""
    return (generation.incarnation, generation.generation, generation.nonce)


def chain_of(inventories: Sequence[Inventory], *, before: GenerationId) -> Chain:
    """The chain as it was when the generation `before` started."""
    records: dict[GenerationId, Parentage] = {
        record.generation: record
        for inventory in inventories
        for record in inventory.parents
        if age(record.generation) < age(before)
    }
    images = {image.version.generation for inventory in inventories for image in inventory.clean}
    known = {*records, *images}
    ends: dict[GenerationId, int | None] = {}
    current = max((one for one in known if age(one) < age(before)), key=age, default=None)
    end: int | None = None
    while current is not None and current not in ends:
        ends[current] = end
        record = records.get(current)
        parent = record.parent if record is not None else None
        current, end = (parent.generation, parent.step) if parent is not None else (None, None)
    return Chain(ends, frozenset(known))


def choose(question: ChainQuestion) -> Choice:
    """The newest candidate on the chain; memory on ties. The caller refines memory to "peers" per node (`tier_of`)."""
    newest = max([0, *(inventory.newest_step for inventory in question.inventories)])
    choice = _standing(question, newest) or _choose(question, newest)
    if choice.tier != "memory":
        return choice
    return replace(choice, protected=insurance(question, choice), exposed=_is_exposed(question, choice))


def _choose(question: ChainQuestion, newest: int) -> Choice:
    resume = question.resume if question.fresh else "auto"
    if resume == "never":
        return Choice(tier="none", reason="resume is never: training starts from nothing", steps_lost=newest)
    if resume.startswith("path:"):
        return _choose_path(question, resume.removeprefix("path:"), newest)
    wanted = int(resume.removeprefix("step:")) if resume.startswith("step:") else None
    chain = chain_of(question.inventories, before=question.generation)
    rejected: list[Rejected] = []
    memory = _memory_candidates(question, chain, rejected)
    stored = _stored_candidates(question, chain, rejected, named=wanted is not None)
    if wanted is not None:
        rejected += [_not_wanted(f"memory {one.version}", wanted) for one in memory if one.version.step != wanted]
        rejected += [_not_wanted(f"storage {step.path}", wanted) for step in stored if step.step != wanted]
        memory = [one for one in memory if one.version.step == wanted]
        stored = [step for step in stored if step.step == wanted]
        if not memory and not stored:
            return _absent(f"resume={wanted}: there is no such step", rejected)
    return _newest(memory, stored, newest, rejected)


def insurance(question: ChainQuestion, choice: Choice) -> Version | None:
    """Of the coded versions that memory still gives, the one to keep until the new generation has protected one of its
    own: the newest of those that survive a further loss, else the newest one (a further loss may hit a newcomer, who
    holds none of it)."""
    chain = chain_of(question.inventories, before=question.generation)
    best: tuple[bool, int] | None = None
    found: Version | None = None
    for version in _versions(question.inventories):
        if version.step > choice.step or chain.refusal(version) is not None or version in question.excluded:
            continue
        remains = _remains(version, question.inventories, question.bad_images)
        if isinstance(remains, Restoration) and remains.coded:
            key = (remains.spare > 0, version.step)
            if best is None or key > best:
                best, found = key, version
    return found


def _is_exposed(question: ChainQuestion, choice: Choice) -> bool:
    assert choice.version is not None, choice
    remains = _remains(choice.version, question.inventories, question.bad_images)
    return not isinstance(remains, Restoration) or bool(remains.rebuilds) or remains.spare == 0


def _standing(question: ChainQuestion, newest: int) -> Choice | None:
    """A former leader of this generation has chosen already and some node has recorded it: that stands, unless it has
    failed its checks. (A later choice after a failure is the lower one.)"""
    records = [
        record
        for inventory in question.inventories
        for record in inventory.parents
        if record.generation == question.generation
    ]
    if not records:
        return None
    record = min(records, key=lambda record: record.step)
    lost, reason = max(0, newest - record.step), "chosen before by this generation"
    if record.parent is None and record.step == 0:
        return Choice(tier="none", steps_lost=lost, reason=reason)
    if record.parent is None:
        return None
    remains = _remains(record.parent, question.inventories, question.bad_images)
    if record.parent not in question.excluded and isinstance(remains, Restoration):
        return _from_memory(remains, newest, reason, [])
    for step in question.stored:
        if step.version == record.parent and step.path not in question.excluded_paths:
            return _from_storage(step, newest, reason, [])
    return None


def tier_of(choice: Choice, inventories: Sequence[Inventory], member: Member, world_size: int) -> str:
    """memory where the ranks of that node find what they want on it, else peers; other tiers as they are.

    They do where all images of the version lie there, and where the world is the one that wrote it and the node's ranks
    have their own images there: each image holds what its node's replicas share, and its rank's shards.
    """
    if choice.tier != "memory" or choice.version is None:
        return choice.tier
    own = [inventory for inventory in inventories if inventory.node_rank == member.node_rank]
    if _missing_ranks(choice.version, own) == []:
        return "memory"
    images = [image for inventory in own for image in inventory.clean if image.version == choice.version]
    ranks = set(range(member.first_global_rank, member.first_global_rank + member.num_ranks))
    at_home = ranks <= {image.global_rank for image in images if image.world_size == world_size}
    return "memory" if at_home else "peers"


def carried_persists(inventories: Sequence[Inventory], choice: Choice, *, generation: GenerationId) -> tuple[Pin, ...]:
    """Of the pinned versions of older generations those whose persist goes on in `generation`: on the chain, not above
    the restored step, every image still there or to be decoded (`lost_images`)."""
    chain = chain_of(inventories, before=generation)
    pins = {pin.version: pin for inventory in inventories for pin in inventory.pinned}
    return tuple(
        pin
        for version, pin in sorted(pins.items())
        if version.step <= choice.step
        and chain.refusal(version) is None
        and version.generation != generation
        and isinstance(_remains(version, inventories), Restoration)
    )


def lost_images(version: Version, inventories: Sequence[Inventory]) -> tuple[Rebuild, ...]:
    """The images of a version that no node has any more, and what each is decoded from."""
    remains = _remains(version, inventories)
    return remains.rebuilds if isinstance(remains, Restoration) else ()


# --- candidates


def _memory_candidates(question: ChainQuestion, chain: Chain, rejected: list[Rejected]) -> list[Restoration]:
    ours: list[Inventory] = []
    for inventory in question.inventories:
        if question.fresh and (inventory.clean or inventory.parity) and inventory.history != question.history:
            reason = (
                f"the memory of node {inventory.node_rank} belongs to the checkpoint history {inventory.history}, the "
                f"checkpoint directory is of history {question.history}"
            )
            rejected.append(Rejected(candidate=f"memory of node {inventory.node_rank}", reason=reason))
        else:
            ours.append(inventory)
    taken: list[Restoration] = []
    for version in _versions(ours):
        answer = _in_memory(question, chain, version, ours)
        if isinstance(answer, Restoration):
            taken.append(answer)
        else:
            rejected.append(Rejected(candidate=f"memory {version}", reason=answer))
    return taken


def _versions(inventories: Iterable[Inventory]) -> list[Version]:
    """Every version of which there is an image or a parity."""
    found: set[Version] = set()
    for inventory in inventories:
        found |= {image.version for image in inventory.clean} | {held.coded.version for held in inventory.parity}
    return sorted(found)


def _in_memory(
    question: ChainQuestion, chain: Chain, version: Version, inventories: Sequence[Inventory]
) -> Restoration | str:
    if version in question.excluded:
        return "it failed its checks"
    if age(version.generation) >= age(question.generation):
        return f"it is not older than the generation {question.generation} that starts"
    off = chain.refusal(version)
    if off is not None:
        return off
    remains = _remains(version, inventories, question.bad_images)
    return remains if isinstance(remains, Restoration) else remains.reason


def _remains(
    version: Version, inventories: Sequence[Inventory], bad_images: Iterable[tuple[Version, int]] = ()
) -> Restoration | Irretrievable:
    worlds = {image.world_size for one in inventories for image in one.clean if image.version == version}
    worlds |= {held.coded.world_size for one in inventories for held in one.parity if held.coded.version == version}
    if not worlds:
        return Irretrievable(version=version, reason="no living node has any of its images", missing=0)
    if len(worlds) > 1:
        return Irretrievable(version=version, reason="its images name different world sizes", missing=0)
    bad = [rank for bad_version, rank in bad_images if bad_version == version]
    return restoration(version, writers(version, worlds.pop(), inventories), inventories, bad_images=bad)


def _missing_ranks(version: Version, inventories: Iterable[Inventory]) -> list[int] | None:
    """Ranks of which no image is there; None where the images contradict each other or there is none."""
    inventories = tuple(inventories)
    images = [image for inventory in inventories for image in inventory.clean if image.version == version]
    worlds = {image.world_size for image in images}
    if len(worlds) != 1:
        return None
    there = {image.global_rank for image in images}
    return [rank for rank in writers(version, worlds.pop(), inventories) if rank not in there]


def writers(version: Version, world_size: int, inventories: Iterable[Inventory]) -> Sequence[int]:
    """Global ranks that wrote `version` in a world of `world_size`: those of the Session of its generation, where any
    node has recorded them."""
    for inventory in inventories:
        for record in inventory.parents:
            if record.generation == version.generation and record.session_ranks is not None:
                return record.session_ranks
    return range(world_size)


def _stored_candidates(
    question: ChainQuestion, chain: Chain, rejected: list[Rejected], *, named: bool
) -> list[StoredStep]:
    taken: list[StoredStep] = []
    for step in question.stored:
        off = chain.refusal(step.version) if step.version.generation in chain.known and not named else None
        if step.path in question.excluded_paths:
            rejected.append(Rejected(candidate=f"storage {step.path}", reason="it failed its checks"))
        elif off is not None:
            rejected.append(Rejected(candidate=f"storage {step.path}", reason=off))
        else:
            taken.append(step)
    return taken


# --- the choice


def _newest(memory: list[Restoration], stored: list[StoredStep], newest: int, rejected: list[Rejected]) -> Choice:
    best_memory = max(memory, key=lambda one: (one.version.step, age(one.version.generation)), default=None)
    best_stored = max(stored, key=lambda step: (step.step, age(step.version.generation)), default=None)
    if best_memory is not None and (best_stored is None or best_memory.version.step >= best_stored.step):
        reason = f"newest complete version in memory, step {best_memory.version.step}"
        return _from_memory(best_memory, newest, reason, rejected)
    if best_stored is not None:
        why = f"memory only has step {best_memory.version.step}" if best_memory is not None else _why_not(rejected)
        return _from_storage(best_stored, newest, f"newest checkpoint, step {best_stored.step}: {why}", rejected)
    return Choice(tier="none", reason="there is nothing to resume", steps_lost=newest, rejected=tuple(rejected))


def _why_not(rejected: list[Rejected]) -> str:
    """What stands against the newest version in memory."""
    refused = [one for one in rejected if one.candidate.startswith("memory ")]
    return f"{refused[-1].candidate}: {refused[-1].reason}" if refused else "memory holds nothing"


def _choose_path(question: ChainQuestion, wanted: str, newest: int) -> Choice:
    """``resume`` is a tag or a path: of several steps with the tag the newest."""
    rejected: list[Rejected] = []
    usable: list[StoredStep] = []
    for step in question.stored:
        if step.tag != wanted and not _same_path(step.path, wanted):
            rejected.append(Rejected(candidate=f"storage {step.path}", reason=f"it is not {wanted!r}"))
        elif step.path in question.excluded_paths:
            rejected.append(Rejected(candidate=f"storage {step.path}", reason="it failed its checks"))
        else:
            usable.append(step)
    if not usable:
        return _absent(f"resume={wanted!r}: no complete checkpoint has this tag or path", rejected)
    best = max(usable, key=lambda step: (step.step, age(step.version.generation)))
    return _from_storage(best, newest, f"resume={wanted!r}", rejected)


def _from_memory(remains: Restoration, newest: int, reason: str, rejected: list[Rejected]) -> Choice:
    if remains.rebuilds:
        ranks = ", ".join(str(one.global_rank) for one in remains.rebuilds)
        reason += f"; the images of rank {ranks} are decoded from what other nodes hold"
    return Choice(
        tier="memory",
        version=remains.version,
        step=remains.version.step,
        steps_lost=max(0, newest - remains.version.step),
        reason=reason,
        rejected=tuple(rejected),
        rebuilds=remains.rebuilds,
    )


def _from_storage(step: StoredStep, newest: int, reason: str, rejected: list[Rejected]) -> Choice:
    return Choice(
        tier="storage",
        version=step.version,
        step=step.step,
        path=step.path,
        steps_lost=max(0, newest - step.step),
        reason=reason,
        rejected=tuple(rejected),
    )


def _absent(problem: str, rejected: list[Rejected]) -> Choice:
    seen = "; ".join(f"{one.candidate}: {one.reason}" for one in rejected) or "there is nothing in memory or storage"
    return Choice(tier="error", reason=f"{problem} ({seen})", rejected=tuple(rejected))


def _not_wanted(candidate: str, wanted: int) -> Rejected:
    return Rejected(candidate=candidate, reason=f"it is not step {wanted}")


def _same_path(path: str, wanted: str) -> bool:
    return os.path.normpath(path) == os.path.normpath(wanted) or os.path.basename(os.path.normpath(path)) == wanted


def image_sources(version: Version, inventories: Sequence[Inventory]) -> dict[int, tuple[int, CleanImage]]:
    """For each global rank of the world that wrote `version`: a node rank that holds its image, and the image."""
    found: dict[int, tuple[int, CleanImage]] = {}
    for inventory in sorted(inventories, key=lambda one: one.node_rank):
        for image in inventory.clean:
            if image.version == version:
                found.setdefault(image.global_rank, (inventory.node_rank, image))
    return found
