"""A worker without torch: fills slots with images whose bytes tell rank and step. Run as a script by the tests.

Its plan is JSON in argv[1] (`Plan`); what happens to it is printed, one JSON object a line.
"""

from __future__ import annotations

import faulthandler
import json
import os
import signal
import sys
import time
from datetime import timedelta

import msgspec

from holdfast.checkpoint.boxes import Box
from holdfast.checkpoint.image import ImageLayout, block_checksums, header_digest
from holdfast.checkpoint.objects import ObjectRecord, encode_objects
from holdfast.checkpoint.pieces import Piece
from holdfast.environment import worker_environment
from holdfast.errors import CorruptError
from holdfast.snapshot.arena import Slot
from holdfast.snapshot.client import SnapshotClient
from holdfast.snapshot.control import Phase
from holdfast.snapshot.messages import PersistFailedMessage, Restore
from holdfast.snapshot.records import SessionConfig

TIMEOUT = timedelta(seconds=200)
PACE_LIMIT_S = 30.0
"""Where no grant has come for so long there is none to wait for."""


class Plan(msgspec.Struct, kw_only=True):
    """What the worker does."""

    until: int
    ranks: tuple[int, ...]
    """Those of the Session; (): all."""
    checkpoint_dir: str | None = None
    snapshot_every: int = 1
    persist_every_steps: int | None = None
    resume: str = "auto"
    step_s: float = 0.002
    paced: bool = True
    """A step to be copied waits until the daemon has granted it, or a later one: on a busy machine it may not run
    for as long as many steps take. False: as a script of quick steps goes, whatever the daemon does."""
    row_bytes: int = 65536
    grow_at: int | None = None
    """Step from which on the image is four times as large."""
    kill_at: int | None = None
    """SIGKILL to itself in the middle of filling the slot of this step or the next granted one."""
    hang_at: int | None = None
    """Sleep for ever after this step."""
    save_at: int | None = None
    """Ask for a tagged save after this step."""
    stop_at: int | None = None
    """Ask for the end after this step."""
    end_file: str | None = None
    """The first rank asks for the end once this exists."""
    fail_restore: int | None = None
    """Say that this step cannot be restored."""
    persist_end: bool = True
    wait_slots: bool = True
    measure: bool = False
    """Measure the time from a commit to the next change of the grants on the page."""


def say(**what: object) -> None:
    print(json.dumps(what), flush=True)  # noqa: T201


class Images:
    """Images of one rank: a row of a global uint8 tensor ``w`` of shape (ranks of the Session, row_bytes), told by the
    step."""

    def __init__(self, rank: int, world: int, row_bytes: int, ranks: tuple[int, ...]) -> None:
        self.rank, self.world, self.row_bytes = rank, world, row_bytes
        self.row, self.rows = ranks.index(rank), len(ranks)
        piece = Piece(name="w", dtype="uint8", shape=(len(ranks), row_bytes), box=Box((self.row, 0), (1, row_bytes)))
        self.layout = ImageLayout.plan([piece], objects_capacity=4096)

    def value(self, step: int) -> int:
        return (step * 7 + self.row) % 251

    def fill(self, slot: Slot, client: SnapshotClient, step: int, *, die: bool) -> None:
        layout, environment = self.layout, worker_environment()
        assert environment is not None
        version = environment.generation.at(step)
        slot.begin(version, self.rank, self.world)
        image = slot.image[: layout.size_bytes]
        [start] = layout.piece_offsets
        half = self.row_bytes // 2
        image[start : start + half] = bytes([self.value(step)]) * half
        if die:
            say(event="killed", step=step)
            os.kill(os.getpid(), signal.SIGKILL)
        image[start + half : start + self.row_bytes] = bytes([self.value(step)]) * (self.row_bytes - half)
        blob = encode_objects({"session": ObjectRecord(json.dumps({"step": step}).encode())})
        image[layout.objects_offset :] = blob.ljust(layout.objects_capacity, b"\0")
        checksums = block_checksums([image[layout.data_start :]], layout.block_bytes)
        header = layout.header(
            version=version,
            global_rank=self.row,
            world_size=self.rows,
            checksums=checksums,
            objects_bytes=len(blob),
        )
        image[: layout.data_start] = header
        image.release()
        slot.finish(layout.size_bytes, header_digest(header))


def restore(client: SnapshotClient, plan: Plan, rank: int, answer: Restore) -> Restore:
    """Read our row back and check it; the restore that was taken in the end."""
    while answer.tier != "none":
        if plan.fail_restore == answer.step:
            assert answer.version is not None
            answer = client.restore_failed(answer.version, "the test says so", timeout=TIMEOUT)
            continue
        try:
            with client.catalog(answer) as catalog:
                shape = catalog.tensors["w"].shape
                for row in range(shape[0]):
                    out = bytearray(shape[1])
                    catalog.read("w", Box((row, 0), (1, shape[1])), out)
                    wanted = (answer.step * 7 + row) % 251
                    assert out == bytes([wanted]) * len(out), (answer, row, wanted, set(out))
        except CorruptError as error:
            assert answer.version is not None
            answer = client.restore_failed(answer.version, str(error), timeout=TIMEOUT)
            continue
        break
    return answer


def say_failed(client: SnapshotClient) -> None:
    """Persists that failed, of which the daemon has told since the last look."""
    for message in client.poll():
        if isinstance(message, PersistFailedMessage):
            say(event="failed", step=message.version.step, reason=message.reason)


def keep_pace(client: SnapshotClient, step: int) -> bool:
    """Wait until a step after `step` is granted; whether grants are worth waiting for from now on."""
    deadline = time.monotonic() + PACE_LIMIT_S
    while client.slots() != () and not any(granted > step for _, granted in client._page.grants()):
        client._check_fence()
        if time.monotonic() > deadline:
            return False
        time.sleep(0.0005)
    return client.slots() != ()


def main() -> None:
    faulthandler.register(signal.SIGUSR1)
    plan = msgspec.json.decode(sys.argv[1], type=Plan)
    environment = worker_environment()
    assert environment is not None
    rank, world = environment.global_rank, environment.world_size
    plan.ranks = plan.ranks or tuple(range(world))
    if rank not in plan.ranks:
        say(event="done", step=0, committed=[])  # this rank opens no Session
        return
    client = SnapshotClient.connect(environment, timeout=TIMEOUT)
    config = SessionConfig(
        ranks=plan.ranks,
        checkpoint_dir=plan.checkpoint_dir,
        snapshot_every=plan.snapshot_every,
        persist_every_steps=plan.persist_every_steps,
        persist_every_s=None,
        keep="",
        resume=plan.resume,
        has_init_from=False,
    )
    answer = restore(client, plan, rank, client.open(config, timeout=TIMEOUT))
    step = answer.step
    say(event="restored", tier=answer.tier, step=step, lost=answer.steps_lost)
    client.publish_step(step)
    client.reached(Phase.RESTORED, step)
    images = Images(rank, world, plan.row_bytes, plan.ranks)
    client.need_slots(images.layout.size_bytes, plan.until)
    while plan.wait_slots and client.slots() is None:
        time.sleep(0.001)
    committed: list[int] = []
    latencies: list[float] = []
    save = None
    deadline = time.monotonic() + PACE_LIMIT_S
    while answer.exposed and client.slots() != () and time.monotonic() < deadline:  # as `LiveMode.secure`
        slots, slot = client.slots(), client.grant(step)
        if slots and slot is not None:
            images.fill(slots[slot], client, step, die=False)
            client.committed(environment.generation.at(step), slot, 0.0, plan.step_s)
            committed.append(step)
            break
        time.sleep(0.001)
    waits, asked = plan.paced, False
    while step < plan.until:
        if (step + 1) % plan.snapshot_every == 0:
            waits = waits and keep_pace(client, step)
        time.sleep(plan.step_s)
        step += 1
        client.publish_step(step)
        client.beat()
        if step == answer.step + 1:
            client.reached(Phase.FIRST_STEP, step)
        if plan.grow_at == step:
            images = Images(rank, world, plan.row_bytes * 4, plan.ranks)
            client.need_slots(images.layout.size_bytes, plan.until)
        agreed = client.agreed(step)
        slots, slot = client.slots(), client.grant(step)
        if slot is None and agreed is not None:
            slot = client.wait_grant(step, TIMEOUT)
        if slot is not None and slots:
            images.fill(slots[slot], client, step, die=plan.kill_at is not None and step >= plan.kill_at)
            before = client._page.grants()
            rung = time.perf_counter()
            client.committed(environment.generation.at(step), slot, 0.0, plan.step_s)
            committed.append(step)
            while plan.measure and time.perf_counter() < rung + 0.01:
                if client._page.grants() != before:
                    latencies.append(time.perf_counter() - rung)
                    break
        if agreed is not None:
            say(event="agreed", kind=agreed.kind, step=step)
            if agreed.kind == "stop":
                break
        say_failed(client)
        if plan.save_at == step:
            save = client.request_save("tagged", {"loss": 1.5})
        wants_end = plan.end_file is not None and rank == plan.ranks[0] and os.path.exists(plan.end_file)
        if plan.stop_at == step or (wants_end and not asked):
            client.request_end(True)
            asked = True
        if plan.hang_at == step:
            say(event="hangs", step=step)
            time.sleep(600)
    client.final(step, plan.persist_end)
    while not client.slots() and client.slots() != ():
        time.sleep(0.001)
    slots = client.slots()
    if slots and (not committed or committed[-1] != step):
        slot = client.wait_grant(step, TIMEOUT)
        assert slot is not None, step
        images.fill(slots[slot], client, step, die=False)
        client.committed(environment.generation.at(step), slot, 0.0, plan.step_s)
        committed.append(step)
    if plan.persist_end and plan.checkpoint_dir is not None:
        message = client.wait_persisted(environment.generation.at(step), TIMEOUT)
        say(event="persisted", path=message.path, step=message.version.step)
        say_failed(client)
    if save is not None:
        message = save.result(TIMEOUT)
        say(event="saved", step=save.step, tag=message.tag, path=message.path)
    say(event="done", step=step, committed=committed, latencies=latencies)
    client.close(step, "done")


if __name__ == "__main__":
    main()
