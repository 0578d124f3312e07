"""Frozen dataclasses from plain nested dicts, strictly: nothing unknown, nothing missing, nothing of the wrong type.

All problems are reported together. Conversions that lose nothing are made (a list to a tuple, 3 to 3.0, 1e3 to 1000); every
other mismatch is an error.
"""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Mapping
from typing import Any

from skyrl_mega.config.offline_schema import command_of
from skyrl_mega.config.schema import REQUIRED, Config
from skyrl_mega.config.settings import all_settings, default_of, nearest, section_keys, type_hints, words_for
from skyrl_mega.errors import ConfigError

#: YAML reads a bare `on` or `off` as a boolean; where a choice has that word, the word was meant.
_YAML_BOOLEANS = {True: "on", False: "off"}


class Problems(list[str]):
    """What is wrong with a configuration of the schema `root`."""

    def __init__(self, root: type) -> None:
        super().__init__()
        self.root = root


def how_to_list(root: type = Config) -> str:
    """Where a person finds the settings of `root`."""
    return f"`skyrl-mega {command_of(root)} --print-config` lists every setting, docs/configuration.md explains them."


def config_from_dict(values: Mapping[str, Any], *, allow_missing: bool = False, root: type = Config) -> Any:
    """The configuration of schema `root` that the nested dict `values` describes; keys left out take the schema's default.

    Inverse of `schema.as_dict`. Raises ConfigError with every unknown key, wrong type, value outside a choice and missing
    required setting, numbered. `allow_missing` leaves required settings at `???` (for printing only).
    """
    problems = Problems(root)
    config = _build_section(root, values, "", problems, allow_missing)
    if problems:
        raise ConfigError(numbered(problems))
    return config


def numbered(problems: list[str]) -> str:
    """One problem as it is; several as a numbered list under a headline."""
    if len(problems) == 1:
        return problems[0]
    lines = (f"{number:>3}. {problem}" for number, problem in enumerate(problems, start=1))
    return f"{len(problems)} problems in the configuration:\n" + "\n".join(lines)


def unknown_key_problem(key: str, root: type = Config) -> str:
    """The message for a key that is not in the schema."""
    guess = nearest(key, [*(setting.key for setting in all_settings(root)), *section_keys(root)])
    return f"`{key}` is not a setting{f'; did you mean `{guess}`?' if guess else '.'} {how_to_list(root)}"


def _build_section(cls: type, values: Mapping[Any, Any], prefix: str, problems: Problems, allow_missing: bool) -> Any:
    fields = {field.name: field for field in dataclasses.fields(cls)}
    for name in values:
        if name not in fields:
            problems.extend(unknown_key_problem(key, problems.root) for key in _leaf_keys(f"{prefix}{name}", values[name]))
    built: dict[str, Any] = {}
    for name, field in fields.items():
        key, hint = f"{prefix}{name}", type_hints(cls)[name]
        if dataclasses.is_dataclass(hint):
            inner = values.get(name, {})
            if isinstance(inner, Mapping):
                built[name] = _build_section(typing.cast(type, hint), inner, f"{key}.", problems, allow_missing)
            else:
                example = _example_in(key, problems.root)
                problems.append(f"`{key}` is a section of settings, got {_shown(inner)}; set its parts, as in `{example}=...`.")
            continue
        value = values.get(name, default_of(field))
        if isinstance(value, str) and value == REQUIRED:
            if allow_missing:
                built[name] = REQUIRED
            else:
                how = "Write it into the mapping." if "]" in key else f"Set it with `{key}=...`."
                problems.append(f"`{key}` is required and was not given: {field.metadata['doc']} {how}")
            continue
        built[name] = _convert(key, hint, value, problems)
    return cls(**built) if set(built) == set(fields) else None


def _convert(key: str, hint: Any, value: Any, problems: Problems) -> Any:
    """`value` as `hint`; appends to `problems` and returns the value unchanged where that can't be done."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Literal:
        if isinstance(value, bool) and _YAML_BOOLEANS[value] in args:
            return _YAML_BOOLEANS[value]
        if value not in args or not isinstance(value, str):
            guess = nearest(str(value), args)
            hint_text = f" Did you mean `{key}={guess}`?" if guess else f" Try `{key}={args[0]}`."
            problems.append(f"`{key}` must be {words_for(hint)}; got {_shown(value)}.{hint_text}")
        return value
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            problems.append(f"`{key}` must be {words_for(hint)}; got {_shown(value)}. Write `{key}=[{value}]`.")
            return value
        return tuple(_convert(f"{key}[{index}]", args[0], item, problems) for index, item in enumerate(value))
    if origin is types.UnionType:
        return _build_kind(key, args, value, problems)
    if dataclasses.is_dataclass(hint):
        if not isinstance(value, Mapping):
            names = ", ".join(field.name for field in dataclasses.fields(hint))
            problems.append(f"`{key}` must be a mapping; got {_shown(value)}. It has: {names}.")
            return value
        return _build_item(key, typing.cast(type, hint), value, problems, "this item")
    if origin is dict:
        if not isinstance(value, Mapping):
            problems.append(f"`{key}` must be {words_for(hint)}; got {_shown(value)}. Write `{key}={{name: value}}`.")
            return value
        problems.extend(
            f"`{key}` must have strings as keys; got {_shown(name)}. Quote it." for name in value if not isinstance(name, str)
        )
        return dict(value)
    return _convert_scalar(key, hint, value, problems)


def _build_kind(key: str, classes: tuple[type, ...], value: Any, problems: Problems) -> Any:
    """The one of `classes` that the mapping's `kind` names, built from the rest of it."""
    by_kind = {kind: cls for cls in classes for kind in typing.get_args(type_hints(cls)["kind"])}
    if not isinstance(value, Mapping):
        problems.append(
            f"`{key}` must be a mapping; got {_shown(value)}. Write `{{name: ..., kind: {next(iter(by_kind))}, ...}}`."
        )
        return value
    kind = value.get("kind")
    if not isinstance(kind, str) or kind not in by_kind:
        guess = nearest(str(kind), by_kind)
        problems.append(
            f"`{key}.kind` must be one of {', '.join(by_kind)}; got {_shown(kind)}."
            + (f" Did you mean `{guess}`?" if guess else " Write it into the mapping.")
        )
        return value
    return _build_item(key, by_kind[kind], value, problems, f"the kind {kind}")


def _build_item(key: str, cls: type, value: Mapping[Any, Any], problems: Problems, what: str) -> Any:
    """An item of a list of mappings; its keys are no settings of their own, and are looked for among its own."""
    known = [field.name for field in dataclasses.fields(cls)]
    for name in value:
        if name not in known:
            guess = nearest(str(name), known)
            problems.append(
                f"`{key}.{name}` is not a setting of {what}{f'; did you mean `{guess}`?' if guess else '.'} "
                f"It has: {', '.join(known)}."
            )
    return _build_section(cls, {n: v for n, v in value.items() if n in known}, f"{key}.", problems, allow_missing=False)


def _convert_scalar(key: str, hint: type, value: Any, problems: Problems) -> Any:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if hint is float and is_number and math.isfinite(value):
        return float(value)
    if hint is int and is_number and math.isfinite(value) and value == int(value):
        return int(value)
    if hint in (bool, str) and isinstance(value, hint):
        return value
    if hint is str and key.endswith("]"):
        remedy = f"Quote the item to keep it as text: `'{key.partition('[')[0]}=[\"{value}\"]'`."
    elif hint is str and isinstance(value, (bool, int, float)):
        remedy = f"Quote it to keep it as text: `'{key}=\"{value}\"'`."
    elif value is None:
        remedy = f"Leave it out for the default, or give one: `{key}=...`."
    elif is_number and not math.isfinite(value):
        remedy = "Give a finite one."
    elif hint is int and is_number:
        remedy = f"Try `{key}={math.floor(value)}` or `{key}={math.ceil(value)}`."
    else:
        remedy = f"Write it as in `{key}={_example(key, problems.root)}`."
    problems.append(f"`{key}` must be {words_for(hint)}; got {_shown(value)}. {remedy}")
    return value


def _leaf_keys(key: str, value: Any) -> list[str]:
    """The dotted keys below `key`: of an unknown section, every setting in it is named."""
    if not isinstance(value, Mapping) or not value:
        return [key]
    return [leaf for name, item in value.items() for leaf in _leaf_keys(f"{key}.{name}", item)]


def _shown(value: Any) -> str:
    kind = {str: "a string", bool: "a boolean", int: "an integer", float: "a float", list: "a list", dict: "a mapping"}
    if value is None:
        return "nothing (null)"
    return f"{value!r} ({kind.get(type(value), type(value).__name__)})"


def _example(key: str, root: type) -> Any:
    default = {setting.key: setting.default for setting in all_settings(root)}.get(key, "...")
    if default == REQUIRED:
        return "..."
    return str(default).lower() if isinstance(default, bool) else default


def _example_in(section: str, root: type) -> str:
    return next(setting.key for setting in all_settings(root) if setting.key.startswith(f"{section}."))
