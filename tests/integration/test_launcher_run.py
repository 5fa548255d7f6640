"""`holdfast run` on one node, as a drop-in for torchrun, with workers that mostly know nothing of torch or holdfast."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import holdfast
from support.jobs import BIN, Job, job_in, leftovers, marked

WAIT_S = 200.0


@pytest.fixture
def job(tmp_path: Path) -> Iterator[Job]:
    with job_in(tmp_path) as found:
        yield found


def bash(job: Job, text: str, *flags: str) -> list[str]:
    """Run `text` with bash in two workers, without snapshots in memory."""
    script = job.root / "worker.sh"
    script.write_text(text)
    return job.holdfast(
        "--hold-snapshot-memory", "0", "--nproc-per-node", "2", *flags, "--no-python", "bash", str(script)
    )


def wait_for(condition: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline, f"{what} did not happen within {WAIT_S} s"
        time.sleep(0.02)


def test_workers_find_the_environment_that_torchrun_gives(job: Job) -> None:
    script = job.root / "env.py"
    script.write_text(
        "import json, os, sys\njson.dump(dict(os.environ), open(f\"{sys.argv[1]}-{os.environ['RANK']}.json\", 'w'))\n"
    )
    flags = ["--nproc-per-node", "2", "--max-restarts", "3", "--role", "trainer"]
    assert job.run([str(BIN / "torchrun"), *flags, str(script), str(job.root / "theirs")]) == 0
    assert job.run(job.holdfast(*flags, str(script), str(job.root / "ours"))) == 0
    varies = {"MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID", "TORCHELASTIC_ERROR_FILE", "_"}
    for rank in range(2):
        theirs = json.loads((job.root / f"theirs-{rank}.json").read_text())
        ours = json.loads((job.root / f"ours-{rank}.json").read_text())
        extra = {name for name in ours if name.startswith("HOLDFAST_")}
        assert extra == {"HOLDFAST_TEST_MARKER"} | {
            f"HOLDFAST_{name}" for name in ("DAEMON", "ARENA", "RUN_DIR", "RUN_ID", "GENERATION", "NODES", "ENCRYPT")
        }
        assert ours.keys() - extra == theirs.keys() - {"HOLDFAST_TEST_MARKER"}
        assert {k: v for k, v in ours.items() if k not in varies | extra} == {
            k: v for k, v in theirs.items() if k not in varies | extra
        }
        assert ours["TORCHELASTIC_ERROR_FILE"].endswith(f"/attempt_0/{rank}/error.json")
    assert leftovers(job, besides="torchelastic_") == []  # torchrun's own


def test_a_script_a_module_and_a_run_path_run_as_main(job: Job) -> None:
    script = job.root / "probe.py"
    script.write_text("import sys\nsys.stdout.write(f'ran {__name__} {sys.argv[1:]}\\n')\n")
    job.environment = {"PYTHONPATH": str(job.root)}
    for number, how in enumerate(([str(script)], ["-m", "probe"], ["--run-path", str(script)])):
        log = f"log-{number}.txt"
        command = job.holdfast("--hold-snapshot-memory", "0", *how, "x${local_rank}", "--flag")
        assert job.run(command, log=log) == 0, job.output(log)
        assert "ran __main__ ['x0', '--flag']" in job.output(log)


def test_logs_are_laid_out_and_prefixed_as_under_torchrun(job: Job) -> None:
    logs = job.root / "logs"
    flags = ["--log-dir", str(logs), "--redirect=3", "--tee", "3", "--max-restarts", "1"]
    flags += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", "--rdzv-id", "abc"]
    text = 'echo "out $RANK"; echo "err $RANK" >&2; [ "$TORCHELASTIC_RESTART_COUNT" = 1 ] || exit 3\n'
    job.environment = {"TORCHELASTIC_LOG_LINE_PREFIX_TEMPLATE": "[${role_name}-${rank}]:"}
    assert job.run(bash(job, text, *flags)) == 0, job.output()
    (run,) = logs.iterdir()
    assert run.name.startswith("abc_")
    for attempt in range(2):
        for rank in range(2):
            folder = run / f"attempt_{attempt}" / str(rank)
            assert (folder / "stdout.log").read_text() in (f"out {rank}\n", "")  # a survivor may end before it prints
    assert (run / "attempt_1" / "1" / "stderr.log").read_text() == "err 1\n"
    assert "[default-1]:out 1" in job.output()


def test_restarts_are_counted_and_each_generation_has_its_own_store(job: Job) -> None:
    text = """
echo "$MASTER_PORT" >> ports-$RANK
[ "$RANK $TORCHELASTIC_RESTART_COUNT" != "1 2" ] && [ "$RANK" = 1 ] && exit 9
[ "$TORCHELASTIC_RESTART_COUNT" = 2 ] || sleep 30
"""
    assert job.run(bash(job, text, "--max-restarts", "2")) == 0, job.output()
    ports = (job.root / "ports-1").read_text().split()
    assert len(ports) == 3
    started = [event for event in job.events() if event["kind"] == "generation_started"]
    assert [event["restart_count"] for event in started] == [0, 1, 2]
    assert len({event["store"] for event in started}) == 3
    recoveries = [event for event in job.events() if event["kind"] == "recovery"]
    assert [set(event["phases"]) for event in recoveries] == [{"stopped", "agreed", "started"}] * 2
    assert leftovers(job) == []


def test_exhausted_restarts_name_the_first_failing_rank(job: Job) -> None:
    text = '[ "$RANK" = 1 ] && exit 7; sleep 60\n'
    job.environment = {"TORCHELASTIC_ERROR_FILE": str(job.root / "agent-error.json")}
    assert job.run(bash(job, text)) == 1
    assert "Root Cause (first observed failure):" in job.output()
    root_cause = job.output().split("Root Cause")[1]
    assert "rank      : 1 (local_rank: 1)" in root_cause
    assert "exitcode  : 7" in root_cause
    assert leftovers(job) == []


def test_the_traceback_of_a_recorded_worker_reaches_banner_and_error_file(job: Job) -> None:
    script = job.root / "fails.py"
    script.write_text(
        "from torch.distributed.elastic.multiprocessing.errors import record\n"
        "@record\ndef main():\n    raise ValueError('seven')\nmain()\n"
    )
    job.environment = {"TORCHELASTIC_ERROR_FILE": str(job.root / "agent-error.json")}
    assert job.run(job.holdfast("--hold-snapshot-memory", "0", str(script))) == 1
    assert "ValueError: seven" in job.output().split("Root Cause")[1]
    copied = json.loads((job.root / "agent-error.json").read_text())
    assert copied["message"]["message"] == "ValueError: seven"
    assert copied["message"]["errorCode"] == 1
    (failed,) = [event for event in job.events() if event["kind"] == "worker_failed"]
    assert failed["message"] == "ValueError: seven"


def test_a_worker_that_traps_sigterm_does_not_hold_up_a_restart(job: Job) -> None:
    text = """
if [ "$TORCHELASTIC_RESTART_COUNT" = 1 ]; then exit 0; fi
if [ "$RANK" = 0 ]; then
  trap 'touch trapped; sleep 600; touch survived' TERM
  touch ready; while true; do sleep 0.1; done
fi
while [ ! -e ready ]; do sleep 0.05; done
exit 5
"""
    assert job.run(bash(job, text, "--max-restarts", "1")) == 0, job.output()
    assert (job.root / "trapped").exists()
    assert not (job.root / "survived").exists()


def test_a_shutdown_timeout_that_was_given_is_kept(job: Job) -> None:
    text = """
if [ "$TORCHELASTIC_RESTART_COUNT" = 1 ]; then exit 0; fi
if [ "$RANK" = 0 ]; then
  trap 'sleep 2; touch survived; exit 0' TERM
  touch ready; while true; do sleep 0.1; done
fi
while [ ! -e ready ]; do sleep 0.05; done
exit 5
"""
    assert job.run(bash(job, text, "--max-restarts", "1", "--shutdown-timeout", "200")) == 0, job.output()
    assert (job.root / "survived").exists()


def test_workers_and_what_they_started_die_with_a_killed_agent(job: Job) -> None:
    text = f"{sys.executable} -c \"import time; open('up-$RANK', 'w'); time.sleep(600)\"\necho not reached\n"
    agent = job.start(bash(job, text))
    wait_for(lambda: (job.root / "up-0").exists() and (job.root / "up-1").exists(), "the start of the workers")
    assert len(marked(job.name)) >= 5
    agent.kill()
    agent.wait(60)
    wait_for(lambda: not marked(job.name), "the end of all processes")


@pytest.mark.parametrize(("number", "flags", "code"), [(15, [], 1), (2, ["--hold-requeue-code", "75"], 75)])
def test_a_stop_signal_is_passed_on_and_never_ends_in_success(
    job: Job, number: int, flags: list[str], code: int
) -> None:
    text = f"trap 'touch got-$RANK; exit 0' {number}; touch up-$RANK; while true; do sleep 0.05; done\n"
    agent = job.start(bash(job, text, *flags))
    wait_for(lambda: (job.root / "up-0").exists() and (job.root / "up-1").exists(), "the start of the workers")
    agent.send_signal(number)
    assert agent.wait(WAIT_S) == code, job.output()
    assert (job.root / "got-0").exists()
    assert (job.root / "got-1").exists()
    assert "Traceback" not in job.output()
    assert leftovers(job) == []


def test_a_second_stop_signal_ends_a_stubborn_job_at_once(job: Job) -> None:
    text = "trap 'touch got-$RANK' TERM; touch up-$RANK; while true; do sleep 0.05; done\n"
    agent = job.start(bash(job, text, "--hold-grace", "600"))
    wait_for(lambda: (job.root / "up-0").exists() and (job.root / "up-1").exists(), "the start of the workers")
    agent.terminate()
    wait_for(lambda: (job.root / "got-0").exists() and (job.root / "got-1").exists(), "the first signal")
    agent.terminate()
    assert agent.wait(WAIT_S) == 1
    assert leftovers(job) == []


def test_sigusr1_reaches_workers_and_leaves_the_agent_alive(job: Job) -> None:
    text = "trap 'exit 0' USR1; touch up-$RANK; while true; do sleep 0.05; done\n"
    agent = job.start(bash(job, text))
    wait_for(lambda: (job.root / "up-0").exists() and (job.root / "up-1").exists(), "the start of the workers")
    agent.send_signal(signal.SIGUSR1)
    assert agent.wait(WAIT_S) == 0, job.output()


def test_a_second_run_of_the_same_job_is_told_who_runs(job: Job) -> None:
    agent = job.start(bash(job, "touch up-$RANK; sleep 600\n"))
    wait_for(lambda: (job.root / "up-0").exists(), "the start of the workers")
    assert job.run(bash(job, "true\n"), log="second.txt") == 1
    assert str(agent.pid) in job.output("second.txt")
    assert "--hold-job" in job.output("second.txt")
    assert agent.poll() is None
    agent.terminate()
    agent.wait(WAIT_S)


def test_processes_that_a_finished_worker_left_behind_are_ended(job: Job) -> None:
    assert job.run(bash(job, "sleep 600 &\ntouch done-$RANK\n")) == 0
    assert leftovers(job) == []


def test_a_quiet_run_without_a_run_directory_leaves_no_file(job: Job) -> None:
    command = bash(job, "true\n")
    at = command.index("--hold-run-dir")
    assert job.run(command[:at] + command[at + 2 :]) == 0, job.output()
    assert leftovers(job) == []


def test_what_cannot_be_written_or_read_ends_no_agent(job: Job) -> None:
    """A full disk under the event log, an error file that was cut short, then no place for the logs of workers."""
    job.run_dir.mkdir()
    (job.run_dir / "events.jsonl").symlink_to("/dev/full")
    text = f"""
touch ran-$RANK-$TORCHELASTIC_RESTART_COUNT
while [ ! -e ran-0-$TORCHELASTIC_RESTART_COUNT ] || [ ! -e ran-1-$TORCHELASTIC_RESTART_COUNT ]; do sleep 0.02; done
if [ "$TORCHELASTIC_RESTART_COUNT" = 0 ]; then printf '{{"message": {{"mess' > "$TORCHELASTIC_ERROR_FILE"; exit 3; fi
if [ "$RANK" = 1 ]; then sleep 600; fi
rm -rf {job.run_dir}/logs; touch {job.run_dir}/logs; exit 3
"""
    assert job.run(bash(job, text, "--max-restarts", "2")) == 1, job.output()
    assert (job.root / "ran-0-1").exists()
    assert job.output().count("events.jsonl cannot be written: No space left on device") == 1
    assert "cannot be run: Not a directory" in job.output()
    assert "all 2 restarts of --max-restarts are used" in job.output()
    assert "Traceback" not in job.output()
    assert leftovers(job) == []


def test_a_killed_daemon_is_replaced_while_workers_go_on(job: Job) -> None:
    script = job.root / "wait.py"
    script.write_text("import os, time\nopen('up', 'w')\nwhile not os.path.exists('go'): time.sleep(0.02)\n")
    agent = job.start(job.holdfast(str(script)))
    wait_for(lambda: (job.root / "up").exists(), "the start of the worker")
    (pid,) = [event["pid"] for event in job.events() if event["kind"] == "daemon"]
    (job.run_dir / "daemon-0.log").unlink()
    (job.run_dir / "daemon-0.log").mkdir()  # whatever keeps its log from being written
    os.kill(pid, signal.SIGKILL)
    wait_for(
        lambda: [e["change"] for e in job.events() if e["kind"] == "daemon"][1:] == ["died", "started"], "the next"
    )
    (job.root / "go").touch()
    assert agent.wait(WAIT_S) == 0, job.output()
    started = [event for event in job.events() if event["kind"] == "generation_started"]
    assert len(started) == 1
    assert leftovers(job) == []


@pytest.mark.campaign
def test_a_daemon_that_does_not_answer_keeps_no_restart_and_no_end_waiting_for_ever(job: Job) -> None:
    text = """
touch up-$TORCHELASTIC_RESTART_COUNT
while [ ! -e go-$TORCHELASTIC_RESTART_COUNT ]; do sleep 0.05; done
[ "$TORCHELASTIC_RESTART_COUNT" = 1 ] || exit 3
"""
    (job.root / "worker.sh").write_text(text)
    agent = job.start(job.holdfast("--max-restarts", "1", "--no-python", "bash", str(job.root / "worker.sh")))
    for attempt in range(2):
        wait_for(lambda path=job.root / f"up-{attempt}": path.exists(), "the start of the worker")
        pid = [event["pid"] for event in job.events() if event["kind"] == "daemon"][-1]
        os.kill(pid, signal.SIGSTOP)
        (job.root / f"go-{attempt}").touch()
    assert agent.wait(WAIT_S) == 0, job.output()
    assert [e["change"] for e in job.events() if e["kind"] == "daemon"] == ["started", "died", "started"]
    assert leftovers(job) == []


AS_NOBODY = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"]


def python_of_nobody() -> tuple[str, dict[str, str]] | None:
    """An interpreter that another user can run with our packages, and the variables that it needs."""
    paths = [str(Path(holdfast.__file__).parents[1]), *sys.path]
    variables = {"PYTHONPATH": os.pathsep.join(path for path in paths if path)}
    for python in (sys.executable, f"/usr/bin/python3.{sys.version_info.minor}"):
        check = [
            "sh",
            "-c",
            f"{python} -c 'import holdfast, torch, zmq'",
        ]  # by a shell: it has no powers of root
        if subprocess.run([*AS_NOBODY, *check], env=os.environ | variables, check=False).returncode == 0:
            return python, variables
    return None


def test_a_user_without_privileges_can_run_a_job() -> None:
    if os.getuid() != 0 or shutil.which("setpriv") is None:
        pytest.skip("needs root and setpriv to become another user")
    found = python_of_nobody()
    if found is None:
        pytest.skip("another user cannot run this environment")
    python, variables = found
    with tempfile.TemporaryDirectory(prefix="nobody-", dir="/tmp") as folder, job_in(Path(folder)) as job:
        script = job.root / "worker.sh"
        script.write_text('[ "$TORCHELASTIC_RESTART_COUNT" = 1 ] || exit 3\n')
        (job.root / "tmp").mkdir()
        for path in (job.root, job.root / "tmp"):
            os.chown(path, 65534, 65534)
        job.environment = {"HOME": str(job.root), **variables}
        flags = ["--nproc-per-node", "2", "--max-restarts", "1", "--no-python", "bash", str(script)]
        command = shlex.join([python, "-m", "holdfast.launcher", *job.holdfast(*flags)[2:]])
        assert job.run([*AS_NOBODY, "sh", "-c", command]) == 0, job.output()
        assert "no snapshots in memory" not in job.output()
        assert leftovers(job) == []
        assert not list(Path("/tmp/holdfast-65534").glob(f"{job.name}*"))
