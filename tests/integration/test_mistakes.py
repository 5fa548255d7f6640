"""The mistake table: what a person gets wrong is answered with one clear line and the right exit code."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import nn

import holdfast
from holdfast.errors import HoldfastError, MismatchError, StateError, StorageError, UsageError
from support.jobs import BIN, Job, job_in, leftovers

HELLO = "print('the script ran')\n"
SESSION = """
import sys, torch, holdfast
model = torch.nn.Linear(*{shape})
optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
with holdfast.Session(model=model, optimizer=optimizer, checkpoint_dir={folder!r}, snapshot_every=1{more}) as session:
    for step in session.steps(until={steps}):
        model(torch.ones(2, {shape}[0])).sum().backward()
        optimizer.step()
"""


@dataclass(frozen=True)
class Launch:
    """A mistake on the command line of `holdfast run`."""

    flags: tuple[str, ...]
    code: int
    says: str


LAUNCHES = {
    "missing script": Launch(("--nproc-per-node", "1", "no_such_script.py"), 2, "no_such_script.py"),
    "bad flag": Launch(("--nproc-per-nod3", "1", "hello.py"), 2, "--nproc-per-nod"),
    "no workers": Launch(("--nproc-per-node", "0", "hello.py"), 2, "nproc"),
    "workers are no number": Launch(("--nproc-per-node", "many", "hello.py"), 2, "many"),
    "bad schedule": Launch(("--hold-faults", "explode:rank=1,step=2", "hello.py"), 2, "explode"),
    "bad memory": Launch(("--hold-snapshot-memory", "lots", "hello.py"), 2, "lots"),
    "bad requeue code": Launch(("--hold-requeue-code", "0", "hello.py"), 2, "--hold-requeue-code"),
    "no script at all": Launch(("--nproc-per-node", "1"), 2, "script"),
}


COMMANDS = """
import json, os, sys
from holdfast.launcher import cli, run
for number, command in enumerate(json.loads(sys.argv[1])):
    child = os.fork()
    if child == 0:
        output = os.open(f"log-{number}.txt", os.O_WRONLY | os.O_CREAT)
        os.dup2(output, 1), os.dup2(output, 2)
        sys.argv = ["holdfast", *command]
        sys.exit(cli.main())
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""
"""Runs commands of holdfast one after the other: for all of them together torch is imported once, which takes long."""


@pytest.fixture(scope="module")
def launched(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[int, str, list[str]]]:
    """Exit code, output and leftovers of each mistake."""
    with job_in(tmp_path_factory.mktemp("launches")) as job:
        (job.root / "hello.py").write_text(HELLO)
        commands = json.dumps([job.holdfast(*launch.flags)[1:] for launch in LAUNCHES.values()])
        assert job.run([str(BIN / "python"), "-c", COMMANDS, commands]) == 0, job.output()
        codes = [int(line) for line in job.output().splitlines() if line.isdigit()]
        left = leftovers(job)
        said = [job.output(f"log-{number}.txt") for number in range(len(LAUNCHES))]
        return {name: (code, text, left) for name, code, text in zip(LAUNCHES, codes, said, strict=True)}


@pytest.mark.parametrize("mistake", LAUNCHES)
def test_a_mistake_on_the_command_line_is_one_line_and_no_worker_starts(
    launched: dict[str, tuple[int, str, list[str]]], mistake: str
) -> None:
    launch = LAUNCHES[mistake]
    code, output, left = launched[mistake]
    assert code == launch.code, output
    lines = [line for line in output.splitlines() if line.strip()]
    assert len(lines) == 1, output
    assert launch.says in lines[0]
    assert left == []


@pytest.mark.parametrize(
    ("arguments", "says"),
    [((), "holdfast run"), (("runn", "x.py"), "runn"), (("statsu",), "statsu")],
)
def test_a_wrong_command_names_the_right_ones(tmp_path: Path, arguments: tuple[str, ...], says: str) -> None:
    with job_in(tmp_path) as job:
        assert job.run([str(BIN / "holdfast"), *arguments]) == 2, job.output()
        assert says in job.output()
        assert "Traceback" not in job.output()


def script(job: Job, *, shape: tuple[int, int] = (4, 4), steps: int = 5, more: str = "", folder: str = "ckpt") -> Path:
    path = job.root / "script.py"
    path.write_text(SESSION.format(shape=shape, steps=steps, more=more, folder=str(job.root / folder)))
    return path


def test_an_unwritable_checkpoint_dir_ends_the_job_before_the_first_step(tmp_path: Path) -> None:
    with job_in(tmp_path) as job:
        (job.root / "file").write_text("not a directory")
        assert job.run(job.holdfast("--nproc-per-node", "1", script(job, folder="file/ckpt"))) == 1
        assert_one_clear_line(job, "StorageError", str(job.root / "file"))


def test_an_object_without_a_codec_is_named_with_its_key(tmp_path: Path) -> None:
    more = ", extra={'thing': type('Thing', (), {'state_dict': lambda s: {'a': object()}, 'load_state_dict': print})()}"
    with job_in(tmp_path) as job:
        assert job.run(job.holdfast("--nproc-per-node", "1", script(job, more=more))) == 1
        assert_one_clear_line(job, "StateError", "thing", "register_codec")


def test_a_checkpoint_of_another_model_is_a_mismatch_that_names_the_tensor(tmp_path: Path) -> None:
    with job_in(tmp_path) as job:
        assert job.run(job.holdfast("--nproc-per-node", "1", script(job))) == 0, job.output()
        assert job.run(job.holdfast("--nproc-per-node", "1", script(job, shape=(4, 6), steps=9)), log="other.txt") == 1
        assert_one_clear_line(job, "MismatchError", "weight", log="other.txt")


def test_state_that_does_not_fit_in_memory_trains_on_with_storage_only(tmp_path: Path) -> None:
    with job_in(tmp_path) as job:
        flags = ["--nproc-per-node", "1", "--hold-snapshot-memory", "1M"]
        assert job.run(job.holdfast(*flags, script(job, shape=(1024, 1024), steps=20))) == 0, job.output()
        told = [line for line in job.output().splitlines() if "hold-snapshot-memory" in line or "storage only" in line]
        assert len(told) == 1, job.output()
        assert (job.root / "ckpt" / "step-00000020" / "root").exists()
        assert leftovers(job) == []


def assert_one_clear_line(job: Job, error: str, *says: str, log: str = "log.txt") -> None:
    """The worker's traceback ends in one line with the error's name; nothing of ours is in more lines."""
    lines = {line[line.index(error) :] for line in job.output(log).splitlines() if f"{error}: " in line}
    assert lines, job.output(log)
    for words in says:
        assert any(words in line for line in lines), (words, lines)
    assert leftovers(job) == []


class Anything:
    """State of the given content."""

    def __init__(self, content: object) -> None:
        self._content = content

    def state_dict(self) -> object:
        return self._content

    def load_state_dict(self, state: object) -> None:
        self._content = state


def train(folder: Path, width: int = 4, **more: object) -> None:
    model = nn.Linear(width, width)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    arguments = {"model": model, "optimizer": optimizer, "checkpoint_dir": folder, **more}
    with holdfast.Session(**arguments) as session:
        for _ in session.steps(until=3):
            model(torch.ones(2, width)).sum().backward()
            optimizer.step()


def two_sessions(folder: Path) -> None:
    model = nn.Linear(2, 2)
    with holdfast.Session(model=model), holdfast.Session(model=model):
        pass


def clashing_names(folder: Path) -> None:
    train(folder, model=[nn.Linear(4, 4), nn.Linear(4, 4)], optimizer=None)


def another_model(folder: Path) -> None:
    train(folder)
    train(folder, width=6)


def foreign_optimizer(folder: Path) -> None:
    train(folder, optimizer=torch.optim.SGD(nn.Linear(3, 3).parameters(), lr=0.1))


def no_codec(folder: Path) -> None:
    train(folder, extra={"thing": Anything({"inner": [object()]})})


def steps_outside(folder: Path) -> None:
    next(iter(holdfast.Session(model=nn.Linear(2, 2)).steps(until=1)))


def save_nowhere(folder: Path) -> None:
    with holdfast.Session(model=nn.Linear(2, 2)) as session:
        session.save()


def file_in_the_way(folder: Path) -> None:
    folder.write_text("a file")
    train(folder)


MISTAKES: dict[str, tuple[Callable[[Path], None], type[HoldfastError], str]] = {
    "two sessions at once": (two_sessions, UsageError, "already open"),
    "names that clash": (clashing_names, StateError, "weight"),
    "an optimizer over another model": (foreign_optimizer, StateError, "optimizer"),
    "an object without a codec": (no_codec, StateError, "register_codec"),
    "a checkpoint of another model": (another_model, MismatchError, "weight"),
    "steps outside the block": (steps_outside, UsageError, "with holdfast.Session"),
    "save without a folder": (save_nowhere, UsageError, "checkpoint_dir"),
    "a file in the way": (file_in_the_way, StorageError, "ckpt"),
    "snapshot_every=0": (lambda f: train(f, snapshot_every=0), UsageError, "snapshot_every"),
    "persist_every=-1": (lambda f: train(f, persist_every=-1), UsageError, "persist_every"),
    "keep=0": (lambda f: train(f, keep=0), UsageError, "keep"),
    "resume from nothing": (lambda f: train(f, resume=77), HoldfastError, "77"),
    "init_from nothing": (lambda f: train(f, init_from=f / "absent"), HoldfastError, "absent"),
    "extra that is no state": (lambda f: train(f, extra={"thing": 3}), StateError, "thing"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_with_a_session_is_one_clear_line(tmp_path: Path, mistake: str) -> None:
    make, error, says = MISTAKES[mistake]
    with pytest.raises(error) as caught:
        make(tmp_path / "ckpt")
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_session_can_be_opened_after_one_that_failed_to(tmp_path: Path) -> None:
    with pytest.raises(UsageError):
        two_sessions(tmp_path)
    train(tmp_path / "ckpt")
    assert (tmp_path / "ckpt" / "step-00000003" / "root").exists()
