"""What the ranks of support/elastic.py wrote: which samples count, and which state each step left behind."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Line = dict[str, Any]


@dataclass(frozen=True)
class History:
    """The lines of all ranks of all generations."""

    lines: Sequence[Line]

    @classmethod
    def read(cls, folder: Path) -> History:
        """From the files of all ranks; a line cut short by a kill is left out."""
        lines = []
        for path in sorted(folder.glob("steps-*.jsonl")):
            for text in path.read_text().splitlines():
                if text.endswith("}"):
                    lines.append(json.loads(text))
        return cls(lines)

    @property
    def restored(self) -> list[Line]:
        """Where each later generation began, in order; rank 0 speaks for all."""
        return [line for line in self.lines if line["event"] == "restored" and line["rank"] == 0]

    @property
    def generations(self) -> list[str]:
        """In the order in which rank 0 wrote of them: the nonces in their names have none."""
        return list(dict.fromkeys(line["generation"] for line in self.lines if line["rank"] == 0))

    def surviving(self) -> dict[int, list[Line]]:
        """The lines of each step in the last generation that did it, by step; ranks in order."""
        steps: dict[int, list[Line]] = {}
        for line in self.lines:
            if line["event"] == "step":
                steps.setdefault(line["step"], []).append(line)
        order = {generation: place for place, generation in enumerate(self.generations)}
        return {step: self._last(lines, order) for step, lines in sorted(steps.items())}

    @staticmethod
    def _last(lines: list[Line], order: Mapping[str, int]) -> list[Line]:
        """Of the newest generation; one of which rank 0 wrote nothing was over before any other."""
        newest = max((line["generation"] for line in lines), key=lambda generation: order.get(generation, -1))
        return sorted((line for line in lines if line["generation"] == newest), key=lambda line: line["rank"])

    def samples(self) -> list[int]:
        """The stream of samples that count, in the order of steps and ranks."""
        return [number for lines in self.surviving().values() for line in lines for number in line["numbers"]]

    def losses(self) -> dict[int, float]:
        """Mean over the samples of each step's global batch (a rank's line has its share of it, scaled)."""
        return {step: sum(line["loss"] for line in lines) / len(lines) for step, lines in self.surviving().items()}

    def digests(self, step: int) -> set[str]:
        """Of the state after `step`, over all ranks and generations that finished it."""
        return {line["digest"] for line in self.lines if line["event"] == "step" and line["step"] == step}


def assert_exactly_once(samples: Sequence[int], num_samples: int) -> None:
    """Every epoch of the stream holds each sample once; the last one, which may be unfinished, none twice."""
    for begin in range(0, len(samples), num_samples):
        epoch = samples[begin : begin + num_samples]
        assert len(set(epoch)) == len(epoch), f"twice in the epoch at {begin}"
        assert len(epoch) < num_samples or set(epoch) == set(range(num_samples)), f"missing in the epoch at {begin}"
