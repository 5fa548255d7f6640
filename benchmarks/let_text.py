"""The text of benchmarks/let.py: the source of Python's standard library, in parts, as tokens of a byte-level BPE."""

from __future__ import annotations

import heapq
import json
import re
import sys
from collections import Counter, defaultdict
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

from gpt.train import read_text

CHUNK_BYTES = 64 << 10
"""The text is dealt out in pieces of this size: every tenth to validation, the others in turn to the two parts."""
_WORD = re.compile(rb" ?[A-Za-z]+| ?[0-9]+| ?[^\sA-Za-z0-9]+|\s+")
"""No token reaches across the border of two of these."""

Pair = tuple[int, int]


@dataclass(frozen=True)
class Text:
    """Three parts that share no byte, as token ids (int64)."""

    train: Tensor
    other: Tensor
    validation: Tensor
    bytes_per_token: float


def text_of(limit_bytes: int, vocabulary: int, folder: Path) -> Text:
    """The parts, tokenised by a BPE that was learned on the training part; kept in `folder` once made."""
    kept = folder / f"text-{limit_bytes}-{vocabulary}.npz"
    if not kept.exists():
        parts = _parts(torch.cat(read_text(None, limit_bytes)).numpy().tobytes())
        merges = learn(parts["train"][: 1 << 20], vocabulary)
        ids = {name: encode(part, merges) for name, part in parts.items()}
        np.savez(kept, size=np.array([len(parts["train"])]), **ids)
        (folder / "merges.json").write_text(json.dumps(list(merges)))
    with np.load(kept) as found:
        train, other, validation = (
            torch.from_numpy(found[name].astype(np.int64)) for name in ("train", "other", "validation")
        )
        return Text(train, other, validation, int(found["size"][0]) / len(train))


def _parts(raw: bytes) -> dict[str, bytes]:
    chunks = [raw[at : at + CHUNK_BYTES] for at in range(0, len(raw), CHUNK_BYTES)]
    names = ["validation" if at % 10 == 9 else ("train", "other")[at % 10 % 2] for at in range(len(chunks))]
    return {
        name: b"".join(chunk for chunk, of in zip(chunks, names, strict=True) if of == name)
        for name in ("train", "other", "validation")
    }


def learn(text: bytes, vocabulary: int) -> dict[Pair, int]:
    """Merges of pairs of tokens and the id of each, most frequent first (Sennrich et al. 2016, over bytes)."""
    counts = Counter(_WORD.findall(text))
    words = [list(word) for word in counts]
    times = list(counts.values())
    pairs: Counter[Pair] = Counter()
    places: defaultdict[Pair, set[int]] = defaultdict(set)
    for at, word in enumerate(words):
        for pair in pairwise(word):
            pairs[pair] += times[at]
            places[pair].add(at)
    heap = [(-count, pair) for pair, count in pairs.items()]
    heapq.heapify(heap)
    merges: dict[Pair, int] = {}
    while heap and 256 + len(merges) < vocabulary:
        count, best = heapq.heappop(heap)
        if pairs[best] != -count:
            continue  # an older count of the pair
        merges[best] = 256 + len(merges)
        changed: set[Pair] = set()
        for at in places[best]:
            old, new = words[at], merged(words[at], best, merges[best])
            for pair in pairwise(old):
                pairs[pair] -= times[at]
                changed.add(pair)
            for pair in pairwise(new):
                pairs[pair] += times[at]
                places[pair].add(at)
                changed.add(pair)
            words[at] = new
        for pair in changed:
            if pairs[pair] > 0:
                heapq.heappush(heap, (-pairs[pair], pair))
    return merges


def merged(word: list[int], pair: Pair, token: int) -> list[int]:
    """The word with each occurrence of the pair, from the left, replaced."""
    out: list[int] = []
    at = 0
    while at < len(word):
        if at + 1 < len(word) and (word[at], word[at + 1]) == pair:
            out.append(token)
            at += 2
        else:
            out.append(word[at])
            at += 1
    return out


def encode(text: bytes, merges: dict[Pair, int]) -> np.ndarray:
    """Token ids, uint16."""
    known: dict[bytes, list[int]] = {}
    out: list[int] = []
    for word in _WORD.findall(text):
        ids = known.get(word)
        if ids is None:
            ids = known[word] = _encode_word(list(word), merges)
        out.extend(ids)
    return np.array(out, dtype=np.uint16)


def _encode_word(word: list[int], merges: dict[Pair, int]) -> list[int]:
    while True:
        candidates = [pair for pair in pairwise(word) if pair in merges]
        if not candidates:
            return word
        first = min(candidates, key=merges.__getitem__)
        word = merged(word, first, merges[first])
