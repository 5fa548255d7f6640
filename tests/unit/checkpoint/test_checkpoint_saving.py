from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from checkpoint_images import GENERATION, VERSION
from torch.distributed.tensor import DTensor

import holdfast.checkpoint
from holdfast.checkpoint import api, image
from holdfast.checkpoint.boxes import Box, whole
from holdfast.checkpoint.commit import list_steps, open_checkpoint
from holdfast.checkpoint.dtypes import DTYPES
from holdfast.checkpoint.image import block_checksums
from holdfast.checkpoint.objects import ObjectRecord, encode
from holdfast.checkpoint.pieces import Piece
from holdfast.checkpoint.saving import Ranks, agree, save_pieces
from holdfast.checkpoint.steps import StepInfo
from holdfast.checkpoint.streaming import BlockHasher, hashed
from holdfast.checkpoint.tensors import dtensor_shard, dtype_name, empty_for, tensor_bytes, torch_dtype
from holdfast.errors import CorruptError, MismatchError, PeerError, PeerTimeout, StateError, StorageError
from support.ranks import together


def _random(dtype: str, shape: tuple[int, ...]) -> torch.Tensor:
    tensor = empty_for(dtype, shape)
    raw = tensor_bytes(tensor)
    raw[:] = (
        bytes((7 * i + 3) % 256 for i in range(len(raw))) if dtype != "bool" else bytes(i % 2 for i in range(len(raw)))
    )
    return tensor


@pytest.mark.parametrize("dtype", list(DTYPES))
@pytest.mark.parametrize("shape", [(), (5,), (3, 4), (0, 3)])
def test_tensors_of_every_dtype_come_back(tmp_path: Path, dtype: str, shape: tuple[int, ...]) -> None:
    assert dtype_name(torch_dtype(dtype)) == dtype
    tensor = _random(dtype, shape)
    holdfast.checkpoint.save({"t": tensor}, tmp_path / "c")
    target = empty_for(dtype, shape)
    raw = tensor_bytes(target)
    raw[:] = bytes(len(raw))
    loaded = holdfast.checkpoint.load({"t": target}, tmp_path / "c")
    assert loaded["t"] is target
    assert tensor_bytes(target).tobytes() == tensor_bytes(tensor).tobytes()
    assert tensor_bytes(tensor).nbytes == tensor.numel() * tensor.element_size()


def test_the_bytes_of_a_tensor_are_not_a_copy() -> None:
    tensor = torch.zeros(3, dtype=torch.bfloat16, requires_grad=True)
    tensor_bytes(tensor)[0:2] = torch.tensor(1.5, dtype=torch.bfloat16).view(-1).view(torch.uint8).numpy().tobytes()
    assert tensor[0].item() == 1.5
    for bad in (torch.zeros(4, 4).t(), torch.zeros(3, dtype=torch.complex64).conj(), torch.zeros(2, device="meta")):
        with pytest.raises(ValueError, match="cannot be had"):
            tensor_bytes(bad)
    with pytest.raises(StateError, match="quint8 cannot be stored"):
        dtype_name(torch.quint8)


def _save(path: Path, ranks: Ranks, **kwargs: Any) -> StepInfo:
    pieces = [
        Piece("w", "float32", (8,), Box((ranks.rank * 8 // ranks.world_size,), (8 // ranks.world_size,))),
        Piece("copy", "float32", (8,), whole((8,)), None, ranks.rank == 0),
    ]
    data = torch.arange(8, dtype=torch.float32)
    return save_pieces(
        path,
        ranks=ranks,
        version=VERSION,
        pieces=pieces,
        data=lambda p: tensor_bytes(data[p.box.offsets[0] : p.box.offsets[0] + p.box.lengths[0]]),
        objects={"rank": ObjectRecord(encode(ranks.rank), per_rank=True)},
        **{"timeout": timedelta(seconds=120), **kwargs},
    )


def test_all_ranks_save_one_checkpoint_and_learn_the_same(tmp_path: Path) -> None:
    infos = together(4, lambda ranks: _save(tmp_path / "step-00000100", ranks, tag="t" if ranks.rank == 0 else None))
    assert all(info == infos[0] for info in infos)
    assert infos[0].tag == "t"
    with open_checkpoint(tmp_path / "step-00000100") as catalog:
        out = torch.empty(8)
        catalog.read("w", whole((8,)), tensor_bytes(out))
        assert out.tolist() == list(range(8))
        assert catalog.objects(6) == {"rank": encode(2)}
        assert len(catalog.boxes("copy")) == 1


@pytest.mark.parametrize("failing", [0, 2])
def test_the_error_of_any_rank_fails_the_save_on_every_rank(tmp_path: Path, failing: int) -> None:
    def act(ranks: Ranks) -> StepInfo:
        if ranks.rank == failing:
            return _fail(tmp_path, ranks)
        return _save(tmp_path / "step-00000100", ranks)

    def _fail(path: Path, ranks: Ranks) -> StepInfo:
        class Full:
            def list(self, folder: object) -> list[Any]:
                return []

            def write(self, *args: object, **kwargs: object) -> int:
                raise StorageError("no space is left")

        return _save(path / "step-00000100", ranks, storage=Full())

    errors = together(3, act)
    assert all(isinstance(error, StorageError) and "no space is left" in str(error) for error in errors)
    assert f"rank {failing}: " in str(errors[1])
    assert [info.complete for info in list_steps(tmp_path)] in ([False], [])


def test_an_error_that_is_not_ours_also_fails_the_save_on_every_rank(tmp_path: Path) -> None:
    def act(ranks: Ranks) -> StepInfo:
        if ranks.rank == 1:
            raise_at = Piece("w", "float32", (8,), Box((4,), (4,)))
            return save_pieces(
                tmp_path / "c", ranks=ranks, version=VERSION, pieces=[raise_at], data=lambda p: 1 // 0,  # type: ignore
                objects={}, timeout=timedelta(seconds=120),
            )  # fmt: skip
        return _save(tmp_path / "c", ranks)

    errors = together(2, act)
    assert isinstance(errors[0], PeerError)
    assert "rank 1: " in str(errors[0])
    assert isinstance(errors[1], ZeroDivisionError)


def test_a_rank_that_does_not_come_is_named(tmp_path: Path) -> None:
    def act(ranks: Ranks) -> StepInfo | None:
        return None if ranks.rank == 1 else _save(tmp_path / "c", ranks, timeout=timedelta(seconds=3))

    errors = together(3, act)
    for error in (errors[0], errors[2]):
        assert isinstance(error, PeerTimeout)
        assert "rank 1 did not come" in str(error)


def test_a_second_attempt_does_not_read_what_the_first_left(tmp_path: Path) -> None:
    store = dist.HashStore()

    def act(attempt: int, present: list[int]) -> list[Any]:
        def one(rank: int) -> Any:
            try:
                return _save(tmp_path / "c", Ranks(rank, 2, store), attempt=attempt, timeout=timedelta(seconds=limit))
            except PeerTimeout as error:
                return error

        with ThreadPoolExecutor(2) as pool:
            return list(pool.map(one, present))

    limit = 0.05
    assert isinstance(act(0, [0])[0], PeerTimeout)
    limit = 120
    infos = act(1, [0, 1])
    assert infos[0] == infos[1]


def test_ranks_agree_on_what_rank_0_says() -> None:
    found = together(3, lambda ranks: agree(ranks, "nonce", lambda: f"of {ranks.rank}", timedelta(seconds=120)))
    assert found == ["of 0"] * 3
    with pytest.raises(PeerTimeout, match="rank 0 did not come"):
        agree(Ranks(1, 2, dist.HashStore()), "nonce", str, timedelta(seconds=0.01))


def test_a_state_comes_back_with_its_objects(tmp_path: Path) -> None:
    torch.manual_seed(1)
    model = torch.nn.Linear(3, 4)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(2, 3)).sum().backward()
    optimizer.step()
    state = {"model": model, "optimizer": optimizer, "step": 5, "lists": [torch.ones(2), {"a": (1, 2)}]}
    info = holdfast.checkpoint.save(state, tmp_path / "c")
    assert info.complete
    other = torch.nn.Linear(3, 4)
    other_optimizer = torch.optim.AdamW(other.parameters())
    other(torch.ones(2, 3)).mean().backward()
    other_optimizer.step()
    into = {"model": other, "optimizer": other_optimizer, "step": 0, "lists": [torch.zeros(2), None]}
    loaded = holdfast.checkpoint.load(into, tmp_path / "c")
    assert loaded["step"] == 5
    assert loaded["lists"][0].tolist() == [1, 1]
    assert loaded["lists"][1] == {"a": (1, 2)}
    assert loaded["model"] is other
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)
    assert torch.equal(
        optimizer.state_dict()["state"][0]["exp_avg"], other_optimizer.state_dict()["state"][0]["exp_avg"]
    )


def test_a_checkpoint_of_another_state_is_refused_before_anything_is_loaded(tmp_path: Path) -> None:
    holdfast.checkpoint.save({"a": torch.ones(2), "b": torch.ones(3), "c": torch.ones(1)}, tmp_path / "c")
    target = torch.zeros(2)
    with pytest.raises(MismatchError) as caught:
        holdfast.checkpoint.load(
            {"a": target, "b": torch.zeros(4), "c": torch.zeros(1, dtype=torch.int32), "d": torch.zeros(1)},
            tmp_path / "c",
        )
    assert "d is not saved" in str(caught.value)
    assert "b is saved as float32[3], in the state it is float32[4]" in str(caught.value)
    assert "c is saved as float32[1], in the state it is int32[1]" in str(caught.value)
    assert target.tolist() == [0, 0]
    with pytest.raises(MismatchError, match=r"c is saved but not in the state"):
        holdfast.checkpoint.load({"a": target, "b": torch.zeros(3)}, tmp_path / "c")


def test_saving_twice_to_one_path_is_refused(tmp_path: Path) -> None:
    holdfast.checkpoint.save({"a": 1}, tmp_path / "c")
    with pytest.raises(StorageError, match="committed"):
        holdfast.checkpoint.save({"a": 2}, tmp_path / "c")
    assert holdfast.checkpoint.load({"a": 0}, tmp_path / "c") == {"a": 1}


def test_a_transposed_and_a_conjugated_tensor_are_saved_by_value(tmp_path: Path) -> None:
    a = torch.arange(6.0).reshape(2, 3).t()
    b = torch.tensor([1 + 2j]).conj()
    holdfast.checkpoint.save({"a": a, "b": b}, tmp_path / "c")
    into = {"a": torch.zeros(2, 3).t(), "b": torch.zeros(1, dtype=torch.complex64)}
    holdfast.checkpoint.load(into, tmp_path / "c")
    assert torch.equal(into["a"], a)
    assert torch.equal(into["b"], b.resolve_conj())


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.eye(3).to_sparse(),
        lambda: torch.eye(3).to_sparse_csr(),
        lambda: torch.empty(3, device="meta"),
        lambda: torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8),
        lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
        lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged),
        torch.nn.UninitializedParameter,
        lambda: torch.empty(4, dtype=torch.uint8).view(torch.bits8),
        lambda: "\udc80",
    ],
)
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
def test_what_has_no_plain_bytes_is_refused_by_its_name(tmp_path: Path, make: Callable[[], Any]) -> None:
    with pytest.raises(StateError, match=r"x\.odd|dtype bits8|surrogates"):
        holdfast.checkpoint.save({"x": {"odd": make()}}, tmp_path / "c")
    assert not list_steps(tmp_path)


def test_a_state_that_holds_itself_is_refused(tmp_path: Path) -> None:
    state: dict[str, Any] = {}
    state["again"] = [state]
    with pytest.raises(StateError, match="nested too deep"):
        holdfast.checkpoint.save(state, tmp_path / "c")


class _Tied(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(5, 3)
        self.head = torch.nn.Linear(3, 5, bias=False)
        self.head.weight = self.embedding.weight
        self.register_buffer("a", torch.ones(2))
        self.register_buffer("b", self.a)


def test_tied_parameters_and_buffers_of_a_module_are_saved_once(tmp_path: Path) -> None:
    model = _Tied()
    holdfast.checkpoint.save({"model": model}, tmp_path / "c")
    with open_checkpoint(tmp_path / "c") as catalog:
        assert sorted(catalog.tensors) == ["model.a", "model.embedding.weight"]
    other = _Tied()
    holdfast.checkpoint.load({"model": other}, tmp_path / "c")
    assert other.head.weight is other.embedding.weight
    assert torch.equal(other.head.weight, model.head.weight)
    apart = {"model": {name: torch.zeros_like(tensor) for name, tensor in model.state_dict().items()}}
    holdfast.checkpoint.load(apart, tmp_path / "c")
    assert torch.equal(apart["model"]["head.weight"], model.head.weight)


def test_a_flipped_byte_of_a_saved_state_is_an_error(tmp_path: Path) -> None:
    holdfast.checkpoint.save({"a": torch.ones(300_000)}, tmp_path / "c")
    (path,) = (tmp_path / "c").glob("*.safetensors")
    data = bytearray(path.read_bytes())
    data[5000] ^= 4
    path.write_bytes(data)
    with pytest.raises(CorruptError, match=r"a\[0:300000\] cannot be read: .*rank-00000.*block 0"):
        holdfast.checkpoint.load({"a": torch.zeros(300_000)}, tmp_path / "c")


def test_nothing_of_the_core_imports_torch() -> None:
    import subprocess
    import sys

    code = (
        "import sys, holdfast.checkpoint.commit, holdfast.checkpoint.retention, holdfast.checkpoint.ownership;"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=240)
    assert GENERATION.generation == 4


@pytest.mark.parametrize("shape", [(10, 4), (3, 5), (1, 8), (0, 3)])
@pytest.mark.parametrize("kind", ["shard", "replicate+shard", "shard+shard", "shard0+shard0"])
def test_the_shards_of_a_dtensor_cover_it_once_per_replica(shape: tuple[int, ...], kind: str) -> None:
    from torch.distributed.tensor import Replicate, Shard, init_device_mesh
    from torch.testing._internal.distributed.fake_pg import FakeStore

    placements = {
        "shard": [Shard(0)],
        "replicate+shard": [Replicate(), Shard(0)],
        "shard+shard": [Shard(0), Shard(1)],
        "shard0+shard0": [Shard(0), Shard(0)],
    }[kind]
    counts = torch.zeros(shape, dtype=torch.int64)
    holders: dict[int, tuple[int, ...]] = {}
    local_sizes: list[bool] = []
    for rank in range(4):
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=4)
        try:
            mesh_shape = (4,) if kind == "shard" else (2, 2)
            mesh = init_device_mesh("cpu", mesh_shape, mesh_dim_names=("a", "b")[: len(mesh_shape)])
            tensor = DTensor.from_local(
                torch.empty(_local_shape(shape, mesh, placements)), mesh, placements, shape=torch.Size(shape),
                stride=torch.empty(shape).stride(), run_check=False,
            )  # fmt: skip
            shard = dtensor_shard("w", tensor)
            if not all(box.is_empty for box in shard.boxes):
                holders[rank] = shard.holders
            for box in shard.boxes:
                counts[tuple(slice(o, o + n) for o, n in zip(box.offsets, box.lengths, strict=True))] += 1
            local_sizes.append(sum(box.volume for box in shard.boxes) == tensor.to_local().numel())
        finally:
            dist.destroy_process_group()
    copies = 2 if kind == "replicate+shard" else 1
    assert (counts == copies).all()
    assert all(local_sizes)
    assert holders == {r: ((r % 2, r % 2 + 2) if copies == 2 else (r,)) for r in holders}
    assert bool(holders) == (0 not in shape)


def _local_shape(shape: tuple[int, ...], mesh: Any, placements: Any) -> tuple[int, ...]:
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    return tuple(compute_local_shape_and_global_offset(shape, mesh, placements)[0])


def test_a_partial_dtensor_is_refused() -> None:
    from torch.distributed.tensor import Partial, init_device_mesh
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    try:
        tensor = DTensor.from_local(torch.zeros(2), init_device_mesh("cpu", (2,)), [Partial()], run_check=False)
        with pytest.raises(StateError, match="w: a DTensor with placement"):
            dtensor_shard("w", tensor)
    finally:
        dist.destroy_process_group()


def test_a_state_that_is_saved_again_is_not_planned_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    planned: list[str] = []
    own, plan = api.own, image.ImageLayout.plan
    monkeypatch.setattr(api, "own", lambda *args, **kwargs: (planned.append("own"), own(*args, **kwargs))[1])
    monkeypatch.setattr(
        image.ImageLayout, "plan", lambda *args, **kwargs: (planned.append("layout"), plan(*args, **kwargs))[1]
    )
    for value, columns in ((1.0, 7), (2.0, 7), (3.0, 9)):
        state = {"again": torch.full((300, columns), value), "n": value}
        holdfast.checkpoint.save(state, tmp_path / f"c{value}")
        into = {"again": torch.zeros(300, columns), "n": 0}
        assert holdfast.checkpoint.load(into, tmp_path / f"c{value}")["n"] == value
        assert bool(into["again"].eq(value).all())  # type: ignore[attr-defined]
    assert planned == ["own", "layout"] * 2


def test_small_and_large_chunks_are_hashed_as_they_are_written() -> None:
    chunks = [bytes([i % 251]) * size for i, size in enumerate([3, 0, 300_000, 17, 9_000_000, 1, 1 << 20, 5_000])]
    hasher = BlockHasher(1 << 20)
    assert b"".join(hashed(chunks, hasher)) == b"".join(chunks)
    assert hasher.digests() == block_checksums(chunks, 1 << 20)
