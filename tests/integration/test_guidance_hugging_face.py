"""Guidance of Hugging Face models, by module name, against their own ``output_hidden_states``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from holdfast.errors import UsageError
from holdfast.runtime.guidance import LateToEarly

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore:::transformers")

VOCABULARY = {str(number): number for number in range(97)}


def llama(width: int, layers: int) -> Any:
    config = transformers.LlamaConfig(
        vocab_size=len(VOCABULARY), hidden_size=width, intermediate_size=2 * width, num_hidden_layers=layers,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    torch.manual_seed(width)
    return transformers.LlamaForCausalLM(config)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("teacher")
    llama(32, 2).save_pretrained(path)
    (path / "tokenizer.json").write_text(json.dumps({"model": {"vocab": VOCABULARY}}))
    return path


def batch() -> dict[str, Tensor]:
    tokens = torch.randint(97, (3, 12), generator=torch.Generator().manual_seed(4))
    mask = torch.ones_like(tokens)
    mask[0, :4] = 0
    return {"input_ids": tokens, "attention_mask": mask, "labels": tokens.masked_fill(mask == 0, -100)}


def guided(model: Any, folder: Path, **options: Any) -> LateToEarly:
    return LateToEarly(
        model, folder, **{"layer": "model.layers.1", "teacher_layer": "model.norm", "stop_step": 5,
                          "tokenizer": VOCABULARY, **options}
    )  # fmt: skip


@pytest.mark.parametrize("checkpointed", [False, True])
def test_both_forms_follow_the_hidden_states(folder: Path, checkpointed: bool) -> None:
    found = []
    for attached in (False, True):
        model = llama(48, 4).train()
        if checkpointed:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        guide = guided(model, folder)
        if attached:
            guide.attach(step=1)
        loss = model(**batch()).loss
        (loss if attached else guide(loss, 1)).backward()
        found.append({name: parameter.grad for name, parameter in model.named_parameters()})
        with torch.no_grad():
            inputs = {key: value for key, value in batch().items() if key != "labels"}
            teacher = transformers.AutoModelForCausalLM.from_pretrained(folder)
            ours = model(**inputs, output_hidden_states=True).hidden_states[2]
            theirs = teacher(**inputs, output_hidden_states=True).hidden_states[-1]
        theirs = F.interpolate(theirs, size=48, mode="linear", align_corners=False)
        cosines = F.cosine_similarity(ours, theirs, dim=-1)[inputs["attention_mask"] == 1]
        assert guide.metrics()["cosine"] == pytest.approx(cosines.mean().item(), abs=1e-6)
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-6)


def test_logits_are_distilled(folder: Path) -> None:
    model = llama(48, 4).train()
    guide = guided(model, folder, objective="logits", layer=None, teacher_layer=None)
    guide(model(**batch()).loss, 0).backward()
    assert guide.metrics()["divergence"] > 0


def test_another_tokenizer_is_refused(folder: Path) -> None:
    with pytest.raises(UsageError, match="the teacher has another tokenizer"):
        guided(llama(48, 4), folder, tokenizer={token: 96 - number for token, number in VOCABULARY.items()})
