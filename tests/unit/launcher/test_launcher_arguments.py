"""The command line: torch's flags as torch reads them, ours beside them, one clear line for every mistake."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from holdfast.errors import UsageError
from holdfast.launcher import cli
from holdfast.launcher.arguments import Launch, hold_options, launch_from, parse, parse_duration, parse_size, settle


@pytest.fixture(autouse=True)
def _no_surprises(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "train.py").write_text("")


def launch(*argv: str) -> Launch:
    args = parse(argv)
    return launch_from(args, settle(args), log_dir=Path("logs"))


def test_abbreviations_and_both_spellings_keep_working() -> None:
    one = launch("--nproc_per_node", "3", "--redirect=3", "--max_restarts", "2", "train.py", "--lr", "1")
    other = launch("--nproc-per-node=3", "--redirects", "3", "--max-r", "2", "train.py", "--lr", "1")
    for found in (one, other):
        assert found.config.nproc_per_node == 3
        assert found.max_restarts == 2
        assert found.arguments == ("-u", "train.py", "--lr", "1")


def test_pet_variables_are_defaults_for_torchs_flags_and_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"NPROC_PER_NODE": "2", "MAX_RESTARTS": "5", "HOLD_GRACE": "90s", "NNODES": "2"}.items():
        monkeypatch.setenv(f"PET_{name}", value)
    monkeypatch.setenv("PET_NODE_RANK", "1")
    found = launch("train.py")
    assert (found.config.nproc_per_node, found.max_restarts, found.hold.grace_s) == (2, 5, 90.0)
    assert (found.meeting.node_rank, found.meeting.endpoint) == (1, "127.0.0.1:29500")


def test_max_restarts_that_were_not_given_are_told_from_zero() -> None:
    assert launch("train.py").max_restarts is None
    assert launch("--max-restarts", "0", "train.py").max_restarts == 0


def test_survivors_have_a_second_unless_a_timeout_was_given(monkeypatch: pytest.MonkeyPatch) -> None:
    assert launch("train.py").stop_grace_s == 1.0
    assert launch("--shutdown-timeout", "7", "train.py").stop_grace_s == 7.0
    monkeypatch.setenv("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "5")
    assert launch("train.py").stop_grace_s == 5.0


def test_a_single_node_without_an_endpoint_gets_a_rendezvous_of_its_own() -> None:
    found = launch("--rdzv-id", "mine", "train.py")
    assert found.config.run_id != "mine"  # torch's quirk: the id is replaced
    assert found.meeting.rendezvous_id == "mine"
    assert found.meeting.endpoint == ""


def test_rendezvous_settings_become_limits() -> None:
    flags = ["--nnodes", "2:4", "--rdzv-backend", "c10d", "--rdzv-endpoint", "h:1"]
    conf = "'join_timeout=5,last_call_timeout=1,timeout=5'"
    found = launch(*flags, "--rdzv-conf", conf.strip("'"), "--hold-dead-after", "4s", "train.py").limits
    assert (found.min_nodes, found.max_nodes, found.join_timeout_s, found.last_call_s) == (2, 4, 5.0, 1.0)
    assert found.dead_after_s == 4.0


def test_modules_programs_and_run_paths() -> None:
    assert launch("-m", "pkg.mod", "x").arguments == ("-u", "-m", "pkg.mod", "x")
    program = launch("--no-python", "bash", "x.sh")
    assert (program.command, program.arguments) == ("bash", ("x.sh",))
    assert launch("--run-path", "train.py").arguments[:3] == ("-u", "-m", "holdfast.launcher._run_path")


def test_hold_flags_are_read_in_their_units() -> None:
    flags = ["--hold-snapshot-memory", "1.5G", "--hold_linger", "10m", "--hold-requeue-code", "75", "--hold-job", "j"]
    found = hold_options(parse([*flags, "train.py"]))
    assert (found.snapshot_memory, found.linger_s, found.requeue_code, found.job) == (3 << 29, 600.0, 75, "j")


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["--hold-jbo", "x", "train.py"], "did you mean --hold-job?"),
        (["--nproc-per-node", "0", "train.py"], "at least 1"),
        (["--nproc-per-node", "many", "train.py"], "many"),
        (["--nproc-per-node", "254", "train.py"], "at most 253 workers"),
        (["--hold-no-progress", "0", "train.py"], "1 or more"),
        (["--nnodes", "3:2", "train.py"], "MIN:MAX"),
        (["--max-restarts", "-1", "train.py"], "0 or more"),
        (["missing.py"], "no such script"),
        (["--no-python", "-m", "x"], "exclude each other"),
        (["--rdzv-backend", "etcd", "train.py"], "use c10d"),
        (["--nnodes", "2", "--node-rank", "2", "train.py"], "not among the 2 nodes"),
        (["--nnodes", "1:2", "--rdzv-endpoint", "h:1", "train.py"], "static rendezvous takes one number"),
        (["--rdzv-backend", "c10d", "--rdzv-endpoint", "h:x", "--nnodes", "2", "train.py"], "h:x"),
        (["--hold-faults", "explode:rank=1", "train.py"], "unknown kind"),
        (["--hold-snapshot-memory", "lots", "train.py"], "is no size"),
        (["--hold-grace", "soon", "train.py"], "is no duration"),
        (["--hold-requeue-code", "0", "train.py"], "1 to 255"),
        (["--hold-heartbeat", "5", "train.py"], "dead between beats"),
        (["--redirects", "7", "train.py"], "7"),
        ([], "training_script"),
    ],
)
def test_a_mistake_is_one_line(argv: list[str], expected: str) -> None:
    with pytest.raises(UsageError, match=re.escape(expected)) as raised:
        launch(*argv)
    assert "\n" not in str(raised.value)


def test_help_shows_torchs_flags_ours_and_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    for spelling in ("--help", "--h"):
        with pytest.raises(SystemExit) as raised:
            parse([spelling])
        assert raised.value.code == 0
        printed = capsys.readouterr().out
        assert "--rdzv-endpoint" in printed
        assert "--hold-grace" in printed
        assert "example:" in printed


def test_the_command_names_its_subcommands(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--help"]) == 0
    assert "holdfast run" in capsys.readouterr().out
    assert cli.main(["rum"]) == 2
    assert "unknown command 'rum'" in capsys.readouterr().err
    assert cli.main([]) == 2


def test_an_interrupt_before_anything_has_begun_is_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(arguments: list[str]) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr("holdfast.launcher.run.main", interrupted)
    assert cli.main(["run", "train.py"]) == 130
    assert capsys.readouterr().err == "holdfast: interrupted\n"


@pytest.mark.parametrize(("text", "value"), [("8G", 8 << 30), ("512MiB", 512 << 20), ("100", 100), ("1k", 1024)])
def test_sizes(text: str, value: int) -> None:
    assert parse_size(text) == value


@pytest.mark.parametrize(("text", "value"), [("30", 30.0), ("500ms", 0.5), ("10m", 600.0), ("1.5h", 5400.0)])
def test_durations(text: str, value: float) -> None:
    assert parse_duration(text) == value
