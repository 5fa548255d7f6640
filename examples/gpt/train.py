"""Train a byte-level GPT on the source of Python's standard library, or on any text of your own.

    holdfast run --nproc-per-node 2 examples/gpt/train.py --parallel ddp     # survives its failures
    torchrun     --nproc-per-node 2 examples/gpt/train.py --parallel fsdp2   # the same script, storage only
    python       examples/gpt/train.py --data my.txt --plain                 # the same loop without holdfast

The batch of a step follows from the seed, the step and the rank alone, so a resumed run sees what an undisturbed one
would have seen.
"""

import argparse
import contextlib
import hashlib
import math
import os
import sysconfig
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

VOCABULARY = 256  # a token is a byte


class Attention(nn.Module):
    """Causal self-attention with several heads."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        q, k, v = self.qkv(x).view(batch, length, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(y.transpose(1, 2).reshape(batch, length, width))


class Block(nn.Module):
    """One layer: attention, then a perceptron, each behind a norm and around a residual."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(width)
        self.attention = Attention(width, heads)
        self.mlp_norm = nn.RMSNorm(width)
        self.up = nn.Linear(width, 4 * width, bias=False)
        self.down = nn.Linear(4 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x))
        return x + self.down(F.gelu(self.up(self.mlp_norm(x))))


class GPT(nn.Module):
    """A GPT, over bytes if nothing else is said; the embedding also serves as the output layer."""

    def __init__(self, width: int, layers: int, heads: int, context: int, vocabulary: int = VOCABULARY) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.positions = nn.Embedding(context, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm = nn.RMSNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.apply(self._initialise)
        for block in self.blocks:  # the residual stream keeps its scale whatever the depth (GPT-2)
            for last in (block.attention.out, block.down):
                nn.init.normal_(last.weight, std=0.02 / math.sqrt(2 * layers))
        self.head.weight = self.tokens.weight

    @staticmethod
    def _initialise(module: nn.Module) -> None:
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tokens(tokens) + self.positions.weight[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def read_text(path: Path | None, limit_bytes: int) -> tuple[Tensor, Tensor]:
    """Bytes to train on and bytes to judge by (the last tenth): `path`, or the standard library's source."""
    if path is not None:
        raw = path.read_bytes()[:limit_bytes]
    else:
        library = Path(sysconfig.get_path("stdlib"))
        raw = bytearray()  # bytes would be copied whole for each file
        for source in sorted(library.glob("*.py")) + sorted(library.glob("[a-z]*/*.py")):
            if "site-packages" not in source.parts and len(raw) < limit_bytes:
                raw += source.read_bytes()
        raw = raw[:limit_bytes]
    data = torch.frombuffer(bytearray(raw), dtype=torch.uint8)
    cut = len(data) * 9 // 10
    return data[:cut], data[cut:]


def batch_of(data: Tensor, step: int, rank: int, args: argparse.Namespace) -> tuple[Tensor, Tensor]:
    """Inputs and targets of a step on a rank: a function of seed, step and rank, of nothing else."""
    generator = torch.Generator().manual_seed(hash((args.seed, step, rank)))
    starts = torch.randint(len(data) - args.context - 1, (args.batch,), generator=generator)
    chunk = torch.stack([data[start : start + args.context + 1] for start in starts.tolist()]).long()
    return chunk[:, :-1], chunk[:, 1:]


def loss_of(model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy, in nats per byte."""
    return F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten())


@torch.no_grad()
def validate(model: nn.Module, data: Tensor, rank: int, args: argparse.Namespace) -> float:
    """Loss on the held-out bytes, the same ones each time, averaged over ranks."""
    losses = [loss_of(model, *batch_of(data, step, rank, args)) for step in range(args.eval_batches)]
    mean = torch.stack(losses).mean()
    if dist.is_initialized():
        dist.all_reduce(mean)
        mean /= dist.get_world_size()
    return mean.item()


def parallelise(model: GPT, how: str) -> nn.Module:
    """Replicate (ddp) or shard (fsdp2) the model over the ranks."""
    if not dist.is_initialized():
        return model
    if how == "ddp":
        return nn.parallel.DistributedDataParallel(model)
    from torch.distributed.fsdp import fully_shard

    for block in model.blocks:
        fully_shard(block)
    return fully_shard(model)


def digest(model: nn.Module, optimizer: torch.optim.Optimizer) -> str:
    """SHA-256 of the final weights and optimizer state, over all ranks: equal for equal training."""
    mine = hashlib.sha256()
    for name, parameter in model.named_parameters():
        state = optimizer.state[parameter]
        for key, tensor in [("", parameter), *sorted(state.items())]:
            whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
            mine.update(f"{name} {key} {tuple(whole.shape)}".encode())
            mine.update(whole.detach().cpu().contiguous().numpy().tobytes())
    if not dist.is_initialized():
        return mine.hexdigest()
    all_ranks = [None] * dist.get_world_size()
    dist.all_gather_object(all_ranks, mine.hexdigest())
    return hashlib.sha256(" ".join(all_ranks).encode()).hexdigest()


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--parallel", choices=("ddp", "fsdp2"), default="ddp", help="replicate or shard the model over the ranks")
    add("--data", type=Path, help="a text of your own; default: the source of Python's standard library")
    add("--data-bytes", type=int, default=8 << 20, help="use at most so many bytes of it")
    add("--steps", type=int, default=200)
    add("--batch", type=int, default=8, help="sequences per rank and step")
    add("--context", type=int, default=128, help="bytes per sequence")
    add("--width", type=int, default=128)
    add("--layers", type=int, default=4)
    add("--heads", type=int, default=4)
    add("--lr", type=float, default=1e-3)
    add("--warmup", type=int, default=20, help="steps until the learning rate is reached")
    add("--seed", type=int, default=1337)
    add("--log-every", type=int, default=10)
    add("--eval-batches", type=int, default=8)
    add("--plain", action="store_true", help="never import holdfast")
    add("--checkpoint-dir", help="where checkpoints go; default: none are written")
    add("--persist-every", type=int, default=100, help="steps between checkpoints")
    add("--snapshot-every", type=int, default=1, help="steps between snapshots in memory")
    add("--digest-out", type=Path, help="write the digest of the final weights and optimizer state here")
    return parser


@contextlib.contextmanager
def held_steps(model: nn.Module, optimizer: torch.optim.Optimizer, schedule: object, args: argparse.Namespace):
    """The steps to train, held by a Session; with --plain the same steps and nothing else."""
    if args.plain:
        yield range(args.steps)
        return
    import holdfast

    with holdfast.Session(
        model=model, optimizer=optimizer, extra={"schedule": schedule},
        checkpoint_dir=args.checkpoint_dir, persist_every=args.persist_every if args.checkpoint_dir else None,
        snapshot_every=args.snapshot_every,
    ) as session:  # fmt: skip
        yield session.steps(until=args.steps)


def main() -> None:
    args = arguments().parse_args()
    if "RANK" in os.environ:
        dist.init_process_group("gloo")
    rank = dist.get_rank() if dist.is_initialized() else 0
    torch.set_num_threads(1)  # ranks share the machine's cores
    torch.manual_seed(args.seed)
    train_data, held_out_data = read_text(args.data, args.data_bytes)
    model = parallelise(GPT(args.width, args.layers, args.heads, args.context), args.parallel)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.9, 0.95), weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / args.warmup))

    def say(line: str) -> None:
        if rank == 0:
            print(line, flush=True)

    say(f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters, {len(train_data) / 1e6:.1f} MB of text")
    began, first = time.perf_counter(), None
    with held_steps(model, optimizer, schedule, args) as steps:
        for step in steps:
            first = step if first is None else first
            loss = loss_of(model, *batch_of(train_data, step, rank, args))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            schedule.step()
            if step % args.log_every == 0 or step == args.steps - 1:
                mean_s = (time.perf_counter() - began) / (step - first + 1)
                say(f"step {step:5d}  loss {loss.item():.4f}  {1000 * mean_s:.0f} ms/step")
    final = digest(model, optimizer)  # before the model is used again: FSDP2 leaves some parameters unsharded then
    say(f"loss on held-out text {validate(model, held_out_data, rank, args):.4f}")
    say(f"digest {final}")
    if args.digest_out and rank == 0:
        args.digest_out.write_text(final + "\n")
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
