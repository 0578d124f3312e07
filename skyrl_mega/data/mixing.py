"""An endless stream of rows from several datasets, mixed by weight, that resumes exactly.

Which dataset the next row comes from is arithmetic, not chance: always the one that is furthest behind its share, so that after
n rows every dataset has given n times its share to within one row. With the datasets' sizes as weights, an epoch holds every row
once. Within a dataset each epoch is a permutation of its rows, given by seed and epoch. So the whole state is one counter per
dataset, and says nothing of ranks or batches: a run resumes in the middle of an epoch, also in another layout.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from random import Random
from typing import Any

from skyrl_mega.data.examples import Example, fingerprint
from skyrl_mega.data.hashing import stable_hash
from skyrl_mega.errors import DataError


@dataclass(frozen=True)
class Dataset:
    """Training rows under a name. `weight`: their share of the mixture, relative to the others'; 0: as many as there are."""

    name: str
    examples: Sequence[Example]
    weight: float = 0.0


class MixedStream:
    """Rows of the datasets without end. Raises DataError for a dataset without rows, or two of one name."""

    def __init__(self, datasets: Sequence[Dataset], seed: int) -> None:
        names = [dataset.name for dataset in datasets]
        if len(set(names)) < len(names):
            raise DataError(f"datasets must have names of their own, but are {', '.join(names)}: give `name` to those alike.")
        for dataset in datasets:
            if not dataset.examples:
                raise DataError(f"dataset {dataset.name} has no training row left; leave it out, or hold out fewer.")
        self._datasets = tuple(datasets)
        self._seed = seed
        # Exact numbers: rounding would let two machines mix differently.
        weights = [Fraction(str(dataset.weight)) or Fraction(len(dataset.examples)) for dataset in datasets]
        self._shares = [weight / sum(weights) for weight in weights]
        self._drawn = [0] * len(names)
        self._orders: list[tuple[int, list[int]]] = [(-1, [])] * len(names)
        self._fingerprint = f"{stable_hash(*names, *weights, *(fingerprint(dataset.examples) for dataset in datasets)):016x}"

    @property
    def num_rows(self) -> int:
        """Training rows of all datasets: those of an epoch."""
        return sum(len(dataset.examples) for dataset in self._datasets)

    @property
    def examples(self) -> list[Example]:
        """The training rows of all datasets, one after the other."""
        return [example for dataset in self._datasets for example in dataset.examples]

    @property
    def drawn(self) -> dict[str, int]:
        """Rows drawn so far, by dataset."""
        return {dataset.name: count for dataset, count in zip(self._datasets, self._drawn, strict=True)}

    @property
    def epoch(self) -> float:
        """Epochs gone through."""
        return sum(self._drawn) / self.num_rows

    def next(self, count: int) -> list[Example]:
        """The next `count` rows."""
        return [self._next() for _ in range(count)]

    def _next(self) -> Example:
        total = sum(self._drawn) + 1
        behind = [share * total - drawn for share, drawn in zip(self._shares, self._drawn, strict=True)]
        number = behind.index(max(behind))
        dataset = self._datasets[number]
        epoch, position = divmod(self._drawn[number], len(dataset.examples))
        if self._orders[number][0] != epoch:
            order = list(range(len(dataset.examples)))
            Random(stable_hash("rows", self._seed, dataset.name, epoch)).shuffle(order)
            self._orders[number] = (epoch, order)
        self._drawn[number] += 1
        return dataset.examples[self._orders[number][1][position]]

    def state_dict(self) -> dict[str, Any]:
        """Where the stream stands, JSON-serialisable."""
        return {"kind": "mixture", "seed": self._seed, "fingerprint": self._fingerprint, "drawn": self.drawn}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues as if the rows before `state` had been drawn. Raises DataError if the state is of other data."""
        for name, value in self.state_dict().items():
            if name != "drawn" and state.get(name) != value:
                raise DataError(
                    f"the saved position does not belong to these rows: its {name} is {state.get(name)!r}, here it is {value!r}."
                    " Resume with the rows, data settings and trainer.seed of the saved run, or start a new trainer.run_dir."
                )
        self._drawn = [int(state["drawn"][dataset.name]) for dataset in self._datasets]
