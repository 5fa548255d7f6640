"""Teachers from files, and whether two tokenizers are the same."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
import safetensors.torch
import torch
from torch import nn

import holdfast
from holdfast.errors import CorruptError, MismatchError, UsageError
from holdfast.runtime.guidance import LateToEarly
from holdfast.runtime.guidance_vocabulary import check_same_tokenizer, vocabulary_hash
from holdfast.runtime.guidance_weights import load_weights, weights_hash
from support.guidance_models import Model, loss_of, student, teacher, tokens


def blank() -> Model:
    """A teacher with other weights, as a script makes it."""
    return teacher(seed=99).train()


def save_plainly(path: Path) -> Path:
    holdfast.checkpoint.save({"model": teacher().state_dict()}, path)
    return path


def save_in_a_session(path: Path) -> Path:
    model = teacher().train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with holdfast.Session(model=model, optimizer=optimizer, checkpoint_dir=path) as session:
        for _ in session.steps(until=1):
            loss_of(model, tokens()).backward()
            optimizer.step()
    return path


def save_one_file(path: Path) -> Path:
    safetensors.torch.save_file(teacher().state_dict(), path)
    return path


def save_shards(path: Path) -> Path:
    path.mkdir()
    items = sorted(teacher().state_dict().items())
    for number in range(2):
        safetensors.torch.save_file(dict(items[number::2]), path / f"model-{number + 1:05d}-of-00002.safetensors")
    return path


@pytest.mark.parametrize("save", [save_plainly, save_in_a_session, save_one_file, save_shards])
def test_weights_come_from_checkpoints_and_safetensors(tmp_path: Path, save: object) -> None:
    path = save(tmp_path / "weights")
    made = LateToEarly(student(), blank, teacher_weights=path, layer="blocks.0", teacher_layer="norm", stop_step=3)
    given = LateToEarly(student(), teacher(), layer="blocks.0", teacher_layer="norm", stop_step=3)
    assert made.state_dict()["teacher"] == given.state_dict()["teacher"]


def test_weights_are_cast_to_the_dtype_of_the_module(tmp_path: Path) -> None:
    module = Model(6, 2).bfloat16()
    load_weights(module, save_one_file(tmp_path / "one.safetensors"))
    assert torch.equal(module.head.weight, teacher().head.weight.bfloat16())


def test_tied_weights_are_found_under_their_other_name(tmp_path: Path) -> None:
    module = teacher()
    module.head.weight = module.embed.weight
    saved = {name: tensor for name, tensor in module.state_dict().items() if name != "head.weight"}
    safetensors.torch.save_file(saved, tmp_path / "tied.safetensors")
    other = blank()
    other.head.weight = other.embed.weight
    load_weights(other, tmp_path / "tied.safetensors")
    assert weights_hash(other) == weights_hash(module)
    with pytest.raises(MismatchError, match=r"1 tensors of the teacher are not there: head\.weight"):
        load_weights(blank(), tmp_path / "tied.safetensors")


def test_weights_of_another_model_are_refused(tmp_path: Path) -> None:
    path = save_one_file(tmp_path / "one.safetensors")
    with pytest.raises(MismatchError, match=r"embed.weight is saved as \[11, 6\], the teacher has it as \[11, 8\]"):
        load_weights(Model(8, 2), path)
    with pytest.raises(MismatchError, match=r"6 tensors of the teacher are not there: blocks.2"):
        load_weights(Model(6, 3), path)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x05\x00",
        b"\xff" * 16,
        (20).to_bytes(8, "little") + b"not json, not json, ",
        (12).to_bytes(8, "little") + b'{"a":{"b":1}}',
        (61).to_bytes(8, "little") + b'{"a":{"dtype":"F32","shape":[9],"data_offsets":[0,999999]}}  ',
        (56).to_bytes(8, "little") + b'{"a":{"dtype":"X9","shape":[0],"data_offsets":[0,0]}}   ',
    ],
    ids=["empty", "short", "huge", "text", "fields", "offsets", "dtype"],
)
def test_a_damaged_safetensors_file_is_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "bad.safetensors"
    path.write_bytes(content)
    with pytest.raises(CorruptError, match=r"bad\.safetensors"):
        load_weights(teacher(), path)


def test_the_identity_depends_on_every_weight_and_not_on_wrappers() -> None:
    module = teacher()
    before = weights_hash(module)
    module.blocks[0] = torch.compile(module.blocks[0], backend="eager")
    assert weights_hash(module) == before
    with torch.no_grad():
        module.norm.bias[3] += 1e-12
    assert weights_hash(module) != before


def test_a_hugging_face_folder_is_opened_with_transformers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only what we ask of transformers is checked here: its own loader is not part of this project."""
    (tmp_path / "config.json").write_text("{}")
    asked: list[tuple[object, dict[str, object]]] = []

    class AutoModelForCausalLM:
        @staticmethod
        def from_pretrained(path: Path, **options: object) -> nn.Module:
            asked.append((path, options))
            return teacher()

    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(UsageError, match="needs the package transformers"):
        LateToEarly(student(), tmp_path, layer="blocks.0", teacher_layer="norm", stop_step=3)
    fake = ModuleType("transformers")
    fake.AutoModelForCausalLM = AutoModelForCausalLM
    monkeypatch.setitem(sys.modules, "transformers", fake)
    LateToEarly(student(), str(tmp_path), layer="blocks.0", teacher_layer="norm", stop_step=3)
    assert asked == [(tmp_path, {"use_safetensors": True, "local_files_only": True})]


class WithVocabulary:
    def get_vocab(self) -> dict[str, int]:
        return {"b": 1, "a": 0, "<s>": 2}


def test_the_same_vocabulary_has_one_hash_in_every_form(tmp_path: Path) -> None:
    forms: list[object] = [{"a": 0, "b": 1, "<s>": 2}, WithVocabulary()]
    (tmp_path / "full").mkdir()
    added = [{"id": 2, "content": "<s>"}]
    (tmp_path / "full" / "tokenizer.json").write_text(
        json.dumps({"model": {"vocab": {"a": 0, "b": 1}}, "added_tokens": added})
    )
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "vocab.json").write_text(json.dumps({"<s>": 2, "a": 0, "b": 1}))
    (tmp_path / "unigram.json").write_text(
        json.dumps({"model": {"vocab": [["a", -1.0], ["b", -2.0]]}, "added_tokens": added})
    )
    forms += [tmp_path / "full", str(tmp_path / "old"), tmp_path / "unigram.json"]
    assert len({vocabulary_hash(form) for form in forms}) == 1
    assert vocabulary_hash({"a": 0, "b": 1}) != vocabulary_hash({"a": 1, "b": 0})


def test_a_vocabulary_that_cannot_be_had_refuses_nothing(tmp_path: Path) -> None:
    assert vocabulary_hash(tmp_path) is None
    check_same_tokenizer({"a": 0}, tmp_path)
    check_same_tokenizer(None, {"a": 0})
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(UsageError, match="cannot be read as a tokenizer"):
        vocabulary_hash(tmp_path)
