"""Endless, resumable streams of prompts: from an environment's generator, or from rows.

Both keep O(1) state, and refuse a state that was saved over other data: a position means nothing there.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from random import Random
from typing import Any, Literal, Protocol

from skyrl_mega.config.schema import Config
from skyrl_mega.data.hashing import canonical_json, stable_hash
from skyrl_mega.data.rows import Row, load_rows
from skyrl_mega.data.sampling.curriculum import CurriculumPromptSource
from skyrl_mega.errors import DataError, EnvError
from skyrl_mega.protocols import PromptSource
from skyrl_mega.types import Prompt

#: Share of rows held out for evaluation where no evaluation file is given.
HELD_OUT_SHARE = 0.05


class PayloadMaker(Protocol):
    """The classmethods of an environment class that prompt sources use (see `skyrl_mega.envs.base.TextEnvBase`)."""

    __name__: str

    def generate_payload(self, index: int, seed: int, split: Literal["train", "eval"], **options: Any) -> dict[str, Any]: ...

    def check_options(self, options: Mapping[str, Any]) -> None: ...

    def check_payload(self, payload: Mapping[str, Any]) -> None: ...

    def payload_key(self, payload: Mapping[str, Any]) -> str: ...


def row_key(row: Row) -> str:
    """16 hexadecimal digits of the row's whole content."""
    return f"{stable_hash(canonical_json(row)):016x}"


def _check_state(state: Mapping[str, Any], expected: Mapping[str, Any], fields: Sequence[str], description: str) -> list[int]:
    """The state's counters. Raises DataError unless it was saved by a stream over the same data and seed."""
    for name, value in expected.items():
        if state.get(name) != value:
            raise DataError(
                f"the saved prompt position does not belong to {description}: its {name} is {state.get(name)!r}, here it is "
                f"{value!r}. Resume with the data, env.options and trainer.seed of the saved run, or start a new run_dir."
            )
    counters = [state.get(name) for name in fields]
    if any(type(counter) is not int or counter < 0 for counter in counters):
        raise DataError(f"the saved prompt position must hold the counters {', '.join(fields)} >= 0, but holds {dict(state)!r}.")
    return [int(counter) for counter in counters if counter is not None]


class GeneratorPromptSource:
    """Prompts that an environment class makes by seed and index: 0, 1, 2 ..., none left out.

    The stream is random, not a permutation: in a small task the same problem can come again, as another prompt (its
    `prompt_id`, "train:<index>:<problem>", is unique to the draw). Raises EnvError for unknown options, and where the class
    has no generator.
    """

    def __init__(self, env_class: PayloadMaker, options: Mapping[str, Any], seed: int) -> None:
        env_class.check_options(options)
        self._env_class = env_class
        self._options = dict(options)
        self._seed = seed
        self._index = 0
        try:
            options_json = canonical_json(self._options)
        except (TypeError, ValueError) as error:
            raise DataError(f"env.options must be plain JSON values, but are {self._options!r}: {error}") from error
        self._fingerprint = f"{stable_hash(env_class.__name__, options_json):016x}"

    def next(self, count: int) -> list[Prompt]:
        prompts = [self._prompt(self._index + offset, "train") for offset in range(count)]
        self._index += count
        return prompts

    def eval_prompts(self, count: int) -> list[Prompt]:
        """The first `count` held-out prompts. Raises EnvError if the task has fewer."""
        return [self._prompt(index, "eval") for index in range(count)]

    def _prompt(self, index: int, split: Literal["train", "eval"]) -> Prompt:
        payload = self._env_class.generate_payload(index, self._seed, split, **self._options)
        return Prompt(f"{split}:{index}:{self._env_class.payload_key(payload)}", payload)

    def _identity(self) -> dict[str, Any]:
        return {"kind": "generator", "seed": self._seed, "fingerprint": self._fingerprint}

    def state_dict(self) -> dict[str, Any]:
        return {**self._identity(), "index": self._index}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        [self._index] = _check_state(state, self._identity(), ["index"], f"the generator of {self._env_class.__name__}")


class RowPromptSource:
    """Prompts whose payloads are rows; each epoch is a new permutation of the training rows, fixed by (seed, epoch).

    Without `eval_rows`, about 5% of the rows are held out by a hash of their `key`: equal rows fall on the same side, whatever
    else the file holds. With them, training rows equal to an evaluation row are left out of training. Evaluation prompts
    are distinct. `prompt_id` is "<source_name>:<row number>", rows counted from 0. Raises DataError if nothing is left to train.
    """

    def __init__(
        self,
        rows: Sequence[Row],
        eval_rows: Sequence[Row] | None,
        seed: int,
        source_name: str,
        *,
        key: Callable[[Row], str] = row_key,
    ) -> None:
        self._rows, self._seed, self._source_name = rows, seed, source_name
        keys = [_key_of(row, number, source_name, key) for number, row in enumerate(rows)]
        if eval_rows is None:
            held_out = {k for k in keys if stable_hash("held out", k) < HELD_OUT_SHARE * 2**64}
            self._eval_rows, self._eval_name = rows, source_name
            self._eval_order = _first_of_each(keys, held_out)
        else:
            eval_keys = [_key_of(row, number, f"{source_name} (evaluation)", key) for number, row in enumerate(eval_rows)]
            held_out = set(eval_keys)
            self._eval_rows, self._eval_name = eval_rows, f"{source_name}:eval"
            self._eval_order = _first_of_each(eval_keys, held_out)
        self._train = [number for number, k in enumerate(keys) if k not in held_out]
        if not self._train:
            raise DataError(f"{source_name} leaves no training row: all {len(rows)} rows are held out for evaluation.")
        self._fingerprint = hashlib.blake2b("\n".join([*keys, "|", *sorted(held_out)]).encode(), digest_size=8).hexdigest()
        self._epoch, self._position = 0, 0
        self._order = self._permutation(0)

    @property
    def num_train(self) -> int:
        """Rows that training may draw."""
        return len(self._train)

    @property
    def num_eval(self) -> int:
        """Distinct held-out rows."""
        return len(self._eval_order)

    @property
    def num_drawn(self) -> int:
        """Prompts that were drawn so far, over all epochs."""
        return self._epoch * self.num_train + self._position

    def train_ids(self) -> list[str]:
        """The `prompt_id` of every row that training may draw, in the rows' order."""
        return [self._id(number) for number in self._train]

    def next(self, count: int) -> list[Prompt]:
        prompts = []
        for _ in range(count):
            if self._position == len(self._order):
                self._epoch, self._position = self._epoch + 1, 0
                self._order = self._permutation(self._epoch)
            number = self._order[self._position]
            self._position += 1
            prompts.append(Prompt(self._id(number), self._rows[number]))
        return prompts

    def _id(self, number: int) -> str:
        return f"{self._source_name}:{number}"

    def eval_prompts(self, count: int) -> list[Prompt]:
        """The first `count` held-out prompts. Raises DataError if there are fewer."""
        if count > self.num_eval:
            raise DataError(
                f"{count} evaluation prompts are wanted, but {self._source_name} has {self.num_eval} distinct held-out rows "
                f"(and {self.num_train} training rows). Set evaluation.num_prompts to at most {self.num_eval}, or give more rows "
                "in data.eval_path."
            )
        return [Prompt(f"{self._eval_name}:{number}", self._eval_rows[number]) for number in self._eval_order[:count]]

    def _permutation(self, epoch: int) -> list[int]:
        order = list(self._train)
        Random(stable_hash("epoch", self._seed, epoch)).shuffle(order)
        return order

    def _identity(self) -> dict[str, Any]:
        return {"kind": "rows", "seed": self._seed, "fingerprint": self._fingerprint}

    def state_dict(self) -> dict[str, Any]:
        return {**self._identity(), "epoch": self._epoch, "position": self._position}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        epoch, position = _check_state(state, self._identity(), ["epoch", "position"], self._source_name)
        if position > self.num_train:
            raise DataError(
                f"the saved position {position} lies beyond the {self.num_train} training rows of {self._source_name}."
            )
        self._epoch, self._position = epoch, position
        self._order = self._permutation(epoch)


class FiniteGeneratorSource(RowPromptSource):
    """The first `limit` prompts of a generator, as rows in epochs; held-out prompts are the generator's own.

    `prompt_id` is "<class>[:<limit>]:<index>": the same prompt has the same one in every epoch. Raises as GeneratorPromptSource.
    """

    def __init__(self, env_class: PayloadMaker, options: Mapping[str, Any], seed: int, limit: int) -> None:
        self._generator = GeneratorPromptSource(env_class, options, seed)
        payloads = [prompt.payload for prompt in self._generator.next(limit)]
        super().__init__(payloads, [], seed, f"{env_class.__name__}[:{limit}]")

    def eval_prompts(self, count: int) -> list[Prompt]:
        """The first `count` held-out prompts. Raises EnvError if the task has fewer."""
        return self._generator.eval_prompts(count)


def _key_of(row: Row, number: int, source_name: str, key: Callable[[Row], str]) -> str:
    try:
        canonical_json(row)
    except (TypeError, ValueError) as error:
        raise DataError(f"{source_name} row {number + 1} is not a JSON object: {error}.") from error
    return key(row)


def _first_of_each(keys: Sequence[str], wanted: set[str]) -> list[int]:
    """Row numbers of the wanted keys, each key once, ordered by hash so that a file sorted by topic is sampled evenly."""
    first: dict[str, int] = {}
    for number, key in enumerate(keys):
        if key in wanted:
            first.setdefault(key, number)
    return [first[key] for key in sorted(first, key=lambda key: stable_hash("order", key))]


def make_prompt_source(config: Config, env_class: PayloadMaker) -> PromptSource:
    """The prompt source that `config.data` and `sampling.curriculum` ask for; `env_class` makes the payloads, or checks the rows.

    Everything that can be wrong is found here, before any model is loaded: bad rows (DataError with file and line), too few
    held-out prompts (DataError, EnvError), no generator (EnvError).
    """
    settings, seed = config.data, config.trainer.seed
    rows: RowPromptSource | None = None
    if settings.source != "generator":
        if not settings.path:
            raise DataError(f"data.source={settings.source} needs data.path; set it to the file of training rows.")
        train = _checked_rows(settings.path, settings.source, settings.limit, env_class)
        held_out = _checked_rows(settings.eval_path, settings.source, 0, env_class) if settings.eval_path else None
        rows = RowPromptSource(train, held_out, seed, Path(settings.path).name, key=env_class.payload_key)
    elif settings.limit > 0:
        rows = FiniteGeneratorSource(env_class, config.env.options, seed, settings.limit)
    source: PromptSource
    if rows is None:
        if config.sampling.curriculum != "none":
            raise DataError(
                f"sampling.curriculum={config.sampling.curriculum} needs prompts that come again, and the generator of "
                f"{config.env.name} never ends. Set data.limit to train on its first prompts, or sampling.curriculum=none."
            )
        source = GeneratorPromptSource(env_class, config.env.options, seed)
        env_class.generate_payload(0, seed, "train", **config.env.options)  # a class without one says so now
    else:
        source = rows if config.sampling.curriculum == "none" else CurriculumPromptSource(rows, seed)
    source.eval_prompts(config.evaluation.num_prompts)
    return source


def _checked_rows(path: str, source: str, limit: int, env_class: PayloadMaker) -> list[Row]:
    rows, places = load_rows(path, source, limit=limit)
    for row, place in zip(rows, places, strict=True):
        try:
            canonical_json(row)
            env_class.check_payload(row)
        except (EnvError, TypeError, ValueError) as error:
            raise DataError(f"{place}: {error}") from error
    return rows
