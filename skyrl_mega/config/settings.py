"""The schema as a flat list of dotted keys: what can be set, of which type, and which key a misspelt one meant."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import typing
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from skyrl_mega.config.schema import REQUIRED, Config


@dataclass(frozen=True)
class Setting:
    """One leaf of the schema. `key` is dotted (`trainer.max_steps`), `hint` the resolved type, `default` the plain default."""

    key: str
    hint: Any
    default: Any
    doc: str

    @property
    def is_required(self) -> bool:
        return self.default == REQUIRED

    @property
    def is_free_mapping(self) -> bool:
        """True for a setting whose own keys are not part of the schema (`env.options`)."""
        return typing.get_origin(self.hint) is dict


@functools.cache
def type_hints(cls: type) -> dict[str, Any]:
    """The resolved annotations of a schema class."""
    return typing.get_type_hints(cls)


def default_of(field: dataclasses.Field) -> Any:
    """The field's default value, made by its factory where it has one."""
    return field.default_factory() if field.default_factory is not dataclasses.MISSING else field.default


@functools.cache
def all_settings(cls: type = Config, prefix: str = "") -> tuple[Setting, ...]:
    """Every leaf of the schema in the order of the dataclasses."""
    found: list[Setting] = []
    for field in dataclasses.fields(cls):
        key, hint = f"{prefix}{field.name}", type_hints(cls)[field.name]
        if dataclasses.is_dataclass(hint):
            found.extend(all_settings(typing.cast(type, hint), f"{key}."))
        else:
            found.append(Setting(key, hint, default_of(field), field.metadata["doc"]))
    return tuple(found)


@functools.cache
def section_keys(root: type = Config) -> tuple[str, ...]:
    """Dotted keys of the sections: `model`, `algorithm`, `algorithm.kl` ..."""
    keys = {setting.key.rpartition(".")[0] for setting in all_settings(root)}
    return tuple(sorted(keys | {key.partition(".")[0] for key in keys}))


def nearest(word: str, known: Iterable[str]) -> str | None:
    """The known word closest to `word`, or None where nothing is close. Dotted keys: the same last part counts most."""
    known = list(known)
    leaf = word.rpartition(".")[2]

    def likeness(a: str, b: str) -> float:
        return difflib.SequenceMatcher(None, a, b).ratio()

    def score(candidate: str) -> float:
        return max(likeness(word, candidate), 0.95 * likeness(leaf, candidate.rpartition(".")[2]))

    close = [candidate for candidate in known if score(candidate) >= 0.6]
    return max(close, key=lambda candidate: (score(candidate), likeness(word, candidate)), default=None)


def words_for(hint: Any) -> str:
    """A type in words: `an integer`, `one of auto, cpu, cuda`, `a list of strings` ..."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Literal:
        return "one of " + ", ".join(str(arg) for arg in args)
    if origin is tuple:
        return f"a list of {_PLURALS.get(args[0], 'mappings')}"
    if origin is dict or dataclasses.is_dataclass(hint):
        return "a mapping"
    return _WORDS[hint]


_WORDS = {bool: "true or false", int: "an integer", float: "a number", str: "a string"}
_PLURALS = {bool: "booleans", int: "integers", float: "numbers", str: "strings"}
