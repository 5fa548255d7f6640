"""Whether two tokenizers are the same: by a hash of their vocabularies, where these can be had."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
import xxhash

from holdfast.errors import DECODE_ERRORS, UsageError

Tokenizer = Any  # a mapping from token to id, an object with get_vocab(), or the path of a folder that holds one


def vocabulary_hash(tokenizer: Tokenizer) -> str | None:
    """A hash of a vocabulary, None where it cannot be had.

    Args:
        tokenizer: a mapping of tokens to ids, anything with ``get_vocab()``, or a folder or file of Hugging Face form.

    Raises:
        UsageError: an object that is none of these.
    """
    if isinstance(tokenizer, str | os.PathLike):
        vocabulary = _from_files(Path(tokenizer))
    elif isinstance(tokenizer, Mapping):
        vocabulary = dict(tokenizer)
    elif callable(getattr(tokenizer, "get_vocab", None)):
        vocabulary = dict(tokenizer.get_vocab())
    else:
        raise UsageError(
            f"a {type(tokenizer).__name__} is no tokenizer: give a mapping of tokens to ids, an object with "
            "get_vocab(), or a folder with tokenizer.json"
        )
    if vocabulary is None:
        return None
    ordered = sorted((int(number), str(token)) for token, number in vocabulary.items())
    return xxhash.xxh3_128_hexdigest(msgspec.json.encode(ordered))


def check_same_tokenizer(student: Tokenizer | None, teacher: Tokenizer | None) -> None:
    """Refuse two vocabularies that differ.

    Raises:
        UsageError: they do.
    """
    ours = None if student is None else vocabulary_hash(student)
    theirs = None if teacher is None else vocabulary_hash(teacher)
    if ours is not None and theirs is not None and ours != theirs:
        raise UsageError(
            f"the teacher has another tokenizer (vocabulary {theirs[:12]}, the student's is {ours[:12]}): states are "
            "compared token by token, so both models need the same one"
        )


def _from_files(path: Path) -> dict[str, int] | None:
    for file in (path,) if path.is_file() else (path / "tokenizer.json", path / "vocab.json"):
        if not file.is_file():
            continue
        try:
            read = msgspec.json.decode(file.read_bytes())
        except (OSError, *DECODE_ERRORS) as error:
            raise UsageError(f"{file} cannot be read as a tokenizer: {error}") from error
        whole = isinstance(read.get("model"), dict)
        vocabulary = read["model"].get("vocab") if whole else read
        added = {entry["content"]: entry["id"] for entry in read.get("added_tokens") or ()} if whole else {}
        if isinstance(vocabulary, dict):
            return {**vocabulary, **added}
        if isinstance(vocabulary, list):  # Unigram: pairs of token and score, by id
            return {**{str(pair[0]): number for number, pair in enumerate(vocabulary)}, **added}
    return None
