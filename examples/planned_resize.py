"""What `make demo-nodes` compares with: the training of gpt/train.py in stretches, each on a world of its own.

    torchrun --nproc-per-node 4 examples/planned_resize.py --handover DIR --steps 40  --parallel fsdp2
    torchrun --nproc-per-node 3 examples/planned_resize.py --handover DIR --steps 120 --parallel fsdp2

Stock torch alone: a stretch begins from the checkpoint that the one before has left in DIR by torch.distributed's own
`torch.distributed.checkpoint`, and leaves one. holdfast is not imported.
"""

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

sys.path.insert(0, str(Path(__file__).parent / "gpt"))
from train import GPT, arguments, batch_of, digest, loss_of, parallelise, read_text


def main() -> None:
    parser = arguments()
    parser.add_argument("--handover", type=Path, required=True, help="the checkpoint between two stretches")
    args = parser.parse_args()
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    data, _ = read_text(args.data, args.data_bytes)
    model = parallelise(GPT(args.width, args.layers, args.heads, args.context), args.parallel)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.9, 0.95), weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / args.warmup))
    first = load(args.handover, model, optimizer, schedule) if args.handover.exists() else 0
    for step in range(first, args.steps):
        loss = loss_of(model, *batch_of(data, step, dist.get_rank(), args))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        schedule.step()
        if dist.get_rank() == 0 and (step % args.log_every == 0 or step == args.steps - 1):
            print(f"step {step:5d}  loss {loss.item():.4f}", flush=True)
    weights, moments = get_state_dict(model, optimizer)
    state = {"model": weights, "optimizer": moments, "schedule": schedule.state_dict(), "step": args.steps}
    dcp.save(state, checkpoint_id=args.handover)
    final = digest(model, optimizer)
    if args.digest_out and dist.get_rank() == 0:
        args.digest_out.write_text(final + "\n")
    dist.destroy_process_group()
    sys.stdout.flush()
    # Without the interpreter's end: a thread of gloo may drop the last tensor there, and abort (pytorch issue 190489).
    os._exit(0)


def load(path: Path, model: torch.nn.Module, optimizer: torch.optim.Optimizer, schedule: object) -> int:
    """Take over what the stretch before has left; its steps."""
    weights, moments = get_state_dict(model, optimizer)
    state = {"model": weights, "optimizer": moments, "schedule": schedule.state_dict(), "step": 0}
    dcp.load(state, checkpoint_id=path)
    set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    schedule.load_state_dict(state["schedule"])
    return state["step"]


if __name__ == "__main__":
    main()
