"""Train one of the three models of the experiment: the small teacher, the larger model plain, the larger one guided.

    holdfast run --standalone --nproc-per-node 1 examples/let/train.py teacher --out runs/let
    holdfast run --standalone --nproc-per-node 1 examples/let/train.py plain   --out runs/let
    holdfast run --standalone --nproc-per-node 1 examples/let/train.py guided  --out runs/let

Plain and guided begin with the same weights and see the same batches. Model and text are those of examples/gpt.
"""

import argparse
import json
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from gpt.train import GPT, batch_of, loss_of, read_text, validate

import holdfast
from holdfast import LateToEarly

SIZES = {  # width, layers, heads
    "teacher": (64, 2, 2),
    "plain": (128, 6, 4),
    "guided": (128, 6, 4),
}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("role", choices=tuple(SIZES))
    add("--out", type=Path, default=Path("runs/let"), help="checkpoints and curves of all three go here")
    add("--steps", type=int, default=200)
    add("--weight", type=float, default=1.0, help="lambda at step 0")
    add("--stop", type=float, default=0.5, help="where guidance ends, as a part of all steps")
    add("--layer", default="blocks.1", help="the layer that is guided")
    add("--teacher-layer", default="norm", help="the teacher's layer: its final norm")
    add("--data", type=Path, help="a text of your own; default: the source of Python's standard library")
    add("--data-bytes", type=int, default=2 << 20, help="use at most so many bytes of it")
    add("--batch", type=int, default=8, help="sequences per step")
    add("--context", type=int, default=64, help="bytes per sequence")
    add("--lr", type=float, default=1e-3)
    add("--warmup", type=int, default=20, help="steps until the learning rate is reached")
    add("--seed", type=int, default=1337)
    add("--eval-every", type=int, default=20)
    add("--eval-batches", type=int, default=8)
    return parser.parse_args()


def model_of(role: str, context: int) -> GPT:
    width, layers, heads = SIZES[role]
    return GPT(width, layers, heads, context)


def stop_step_of(args: argparse.Namespace) -> int:
    return max(1, round(args.stop * args.steps))


def guide_of(model: GPT, args: argparse.Namespace) -> LateToEarly:
    """The larger model's early layer follows the small model's last states until `--stop`."""
    return LateToEarly(
        model,
        teacher=lambda: model_of("teacher", args.context),
        teacher_weights=args.out / "teacher" / "checkpoints",
        layer=args.layer,
        teacher_layer=args.teacher_layer,
        weight=args.weight,
        stop_step=stop_step_of(args),
    )


def note(path: Path, **values: float) -> None:
    """One line of the curve. After a recovery steps may stand there twice, with the same values."""
    with path.open("a") as curve:
        curve.write(json.dumps(values) + "\n")
    print("  ".join(f"{name} {value:.4g}" for name, value in values.items()), flush=True)


def main() -> None:
    args = arguments()
    torch.set_num_threads(1)
    folder = args.out / args.role
    folder.mkdir(parents=True, exist_ok=True)
    train_data, held_out_data = read_text(args.data, args.data_bytes)
    torch.manual_seed(args.seed)
    model = model_of(args.role, args.context)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.9, 0.95), weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / args.warmup))
    extra = {"schedule": schedule}
    guide = None
    if args.role == "guided":
        extra["guide"] = guide = guide_of(model, args)

    with holdfast.Session(
        model=model, optimizer=optimizer, extra=extra, checkpoint_dir=folder / "checkpoints", snapshot_every=1
    ) as session:
        for step in session.steps(until=args.steps):
            began = time.perf_counter()
            loss = loss_of(model, *batch_of(train_data, step, 0, args))
            if guide is not None:
                loss = guide(loss, step)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            schedule.step()
            seconds = time.perf_counter() - began
            if (step + 1) % args.eval_every == 0 or step + 1 == args.steps:
                values = guide.metrics() if guide is not None and guide.active else {}
                if guide is not None:
                    values["stop_step"] = stop_step_of(args)
                held_out = validate(model, held_out_data, 0, args)
                note(folder / "curve.jsonl", step=step + 1, held_out=held_out, ms=1000 * seconds, **values)


if __name__ == "__main__":
    main()
