"""The whole experiment at small scale: pretrain the teacher, train the larger model plain and guided, compare, draw.

    python examples/let/experiment.py --out runs/let

Each training runs under `holdfast run`. The guided one is killed once in mid-guidance and goes on from memory.
"""

import argparse
import shutil
import subprocess
import sys
from pathlib import Path

from plot import curve, plot, recoveries

TRAIN = Path(__file__).with_name("train.py")


def arguments() -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="Other options go to train.py: --steps, --weight, --stop, --layer, --data, --seed, ...",
    )  # fmt: skip
    parser.add_argument("--out", type=Path, default=Path("runs/let"), help="replaced if it is there")
    parser.add_argument("--teacher-steps", type=int, default=1000, help="how long the small model is pretrained")
    parser.add_argument("--kill-at", type=int, default=50, help="the step at which the guided run is killed; 0: never")
    return parser.parse_known_args()


def train(role: str, out: Path, options: list[str], kill_at: int = 0) -> None:
    """One training under `holdfast run`, in a process group of one."""
    print(f"--- {role}", flush=True)
    flags = ["--standalone", "--nproc-per-node", "1", "--hold-run-dir", str(out / role / "run")]
    if kill_at:
        flags += ["--hold-faults", f"kill:rank=0,step={kill_at},when=backward"]
    command = [sys.executable, "-m", "holdfast.launcher", *flags, str(TRAIN), role, "--out", str(out), *options]
    subprocess.run(command, check=True)


def compare(out: Path) -> None:
    plain, guided, teacher = (curve(role, out) for role in ("plain", "guided", "teacher"))
    print("\n step   plain  guided  cosine  lambda")
    for step in sorted(plain):
        row = guided[step]
        extra = f"  {row['cosine']:6.3f}  {row['lambda']:6.3f}" if "cosine" in row else ""
        print(f"{step:5d}  {plain[step]['held_out']:6.3f}  {row['held_out']:6.3f}{extra}")
    last = max(plain)
    goal = plain[last]["held_out"]
    reached = next((step for step in sorted(guided) if guided[step]["held_out"] <= goal), None)
    print(f"\nheld-out loss of the teacher: {teacher[max(teacher)]['held_out']:.4f} nats per byte")
    print(f"held-out loss of the plain run after {last} steps: {goal:.4f}")
    print(f"the guided run is there at step {reached}" if reached else "the guided run does not get there")
    for event in recoveries("guided", out):
        print(f"the guided run was killed and went on from {event['tier']}, {event.get('steps_lost', 0)} steps lost")


def main() -> None:
    args, options = arguments()
    shutil.rmtree(args.out, ignore_errors=True)
    train("teacher", args.out, [*options, "--steps", str(args.teacher_steps)])  # the last one given counts
    train("plain", args.out, options)
    train("guided", args.out, options, args.kill_at)
    compare(args.out)
    (args.out / "plot.svg").write_text(plot(args.out))
    print(f"the curves are drawn in {args.out / 'plot.svg'}")


if __name__ == "__main__":
    main()
