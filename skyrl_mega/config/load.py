"""Configuration files and command-line overrides in, one frozen `Config` out. The only module that knows Hydra.

Later wins: the schema's defaults, the chosen groups, the recipe, `section.key=value` overrides. Hydra composes the files and
parses the overrides; what exists and which type it has is the schema's say (`build.py`), so that a misspelt key is reported the
same way wherever it stands. Hydra never changes the directory, writes a file or touches logging here.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import hydra
import hydra.version
import yaml
from hydra._internal.hydra import Hydra
from hydra._internal.utils import create_config_search_path
from hydra.core.config_search_path import SearchPathQuery
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException, OverrideParseException
from hydra.version import VersionBase
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from packaging.version import Version

from skyrl_mega.config.build import config_from_dict, how_to_list, numbered, unknown_key_problem
from skyrl_mega.config.files import (
    CONFIG_PACKAGE,
    config_directories,
    config_groups,
    config_package_dir,
    option_file,
    option_values,
)
from skyrl_mega.config.offline_schema import OWN_SECTION, ROOTS
from skyrl_mega.config.schema import Config, as_dict
from skyrl_mega.config.settings import all_settings, nearest, section_keys
from skyrl_mega.errors import ConfigError

_HYDRA_VERSION_BASE = "1.3"

#: The groups that make sense in every root; the others hold settings of reinforcement learning.
_SHARED_GROUPS = ("model", "parallel")


def load_config(
    overrides: Sequence[str] = (),
    *,
    config_name: str = "train",
    config_dir: Path | None = None,
    allow_missing: bool = False,
    root: type = Config,
) -> Any:
    """The configuration of schema `root` that `config_name` and `overrides` describe, typed and frozen.

    `config_dir` is searched before the files that come with the package; a primary file of its own starts with
    `defaults: [train, _self_]`. `allow_missing` leaves required settings that were not given at `???` (for printing only).
    Raises ConfigError, with all problems in one message. Says nothing about combinations of settings: that is `validate`.
    """
    directories = config_directories(config_dir)
    _require_primary_file(config_name, directories, root)
    parsed = _parse_overrides(overrides, _groups_of(root, directories), root)
    composed = _compose(config_name, [text for text, _ in parsed], config_dir)
    _require_choices_to_count(config_name, parsed, directories, config_dir)
    return config_from_dict(_resolve(composed, root), allow_missing=allow_missing, root=root)


def save_resolved(config: Any, path: Path) -> None:
    """Writes every setting of `config` to `path` as YAML; the file appears whole or not at all."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write("# Every setting of this run, resolved. Written by skyrl-mega.\n" + to_yaml(config))
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def load_saved(path: Path, overrides: Sequence[str] = ()) -> Any:
    """The configuration that `save_resolved` wrote to `path`, of whichever root, changed by `overrides`. Raises ConfigError.

    A group's option replaces the one chosen before: settings that any option of the group gives, and this one does not, go back
    to their defaults.
    """
    path = Path(path)
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(
            f"`{path}` must be a readable configuration file ({error.strerror}). Give a run's own directory."
        ) from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"`{path}` must be YAML as a run writes it; {error}. Restore the file, or start a new run.") from error
    if not isinstance(values, dict):
        raise ConfigError(
            f"`{path}` must hold a mapping of sections; got {type(values).__name__}. Restore the file, or start a new run."
        )
    root = next((root for section, root in OWN_SECTION.items() if section in values), Config)
    for key, value in _overriding_values(overrides, root):
        _set(values, key, value, root)
    return config_from_dict(values, root=root)


def _overriding_values(overrides: Sequence[str], root: type) -> Iterator[tuple[str, Any]]:
    """Dotted key and value of everything that `overrides` set in a configuration that is composed already."""
    directories = config_directories()
    groups = _groups_of(root, directories)
    defaults = {setting.key: setting.default for setting in all_settings(root)}
    for text, override in _parse_overrides(overrides, groups, root):
        key, value = override.key_or_group, override.value()
        if override.is_delete() or key == "recipe":
            raise ConfigError(f"A saved configuration is changed setting by setting; got `{text}`. Write `section.key=value`.")
        if "." in key or isinstance(value, dict):
            yield key, value
            continue
        if not isinstance(value, str):
            raise ConfigError(f"`{key}` must be one of {', '.join(groups[key])}; got `{text}`. Give one of these.")
        for option in groups[key]:
            for touched in option_values(key, option_file(key, option, directories)):
                if touched in defaults:
                    yield touched, defaults[touched]
        yield from option_values(key, option_file(key, value, directories)).items()


def _set(values: dict[str, Any], key: str, value: Any, root: type) -> None:
    *sections, name = key.split(".")
    for section in sections:
        inner = values.setdefault(section, {})
        if not isinstance(inner, dict):
            raise ConfigError(unknown_key_problem(key, root))
        values = inner
    values[name] = value


def to_yaml(config: Any) -> str:
    """Every setting as YAML, in the order of the schema."""
    return yaml.safe_dump(as_dict(config), sort_keys=False, allow_unicode=True, width=120)


def _require_primary_file(config_name: str, directories: Sequence[Path], root: type) -> None:
    of_others = {command for command, other in ROOTS.items() if other is not root}
    known = sorted({file.stem for directory in directories for file in directory.glob("*.yaml")} - of_others)
    if config_name not in known:
        guess = nearest(config_name, known)
        searched = ", ".join(str(directory) for directory in directories)
        raise ConfigError(
            f"The primary configuration must be one of {', '.join(known)}; got `{config_name}`"
            f"{f' (did you mean `{guess}`?)' if guess else ''}. Searched {searched}; add a directory of yours with --config-dir."
        )


def _groups_of(root: type, directories: Sequence[Path]) -> dict[str, tuple[str, ...]]:
    """The groups whose options a configuration of `root` may choose."""
    groups = config_groups(directories)
    return groups if root is Config else {name: groups[name] for name in _SHARED_GROUPS}


def _parse_overrides(overrides: Sequence[str], groups: dict[str, tuple[str, ...]], root: type) -> list[tuple[str, Override]]:
    """Each override as Hydra shall see it, and parsed; raises ConfigError where one can't be meant.

    A dotted key is a setting: it is forced in (`++`), because our files hold only what differs from the schema, and the
    schema checks it afterwards. An undotted key chooses a group's option.
    """
    problems: list[str] = []
    parsed: list[tuple[str, Override]] = []
    for text in overrides:
        try:
            override = OverridesParser.create().parse_override(text)
        except (OverrideParseException, HydraException) as error:
            problems.append(
                f"Overrides are written key=value; `{text}` can't be read ({_one_line(error)}). Quote a value that holds spaces, "
                "commas, brackets or equals signs: `'key=\"a, b\"'`."
            )
            continue
        problem = _override_problem(text, override, groups, root)
        if problem:
            problems.append(problem)
            continue
        is_setting = "." in override.key_or_group or isinstance(override.value(), dict)
        if is_setting and not override.is_delete():
            text = f"++{text.lstrip('+')}"
        elif override.value() is None and not override.is_delete():
            text = f"~{override.key_or_group}"  # group=null: Hydra's word for choosing nothing
        parsed.append((text, override))
    if problems:
        raise ConfigError(numbered(problems))
    return parsed


def _override_problem(text: str, override: Override, groups: dict[str, tuple[str, ...]], root: type) -> str | None:
    key = override.key_or_group
    if override.is_sweep_override():
        return (
            f"An override gives one value; `{text}` reads as several. For a list write `{key}=[...]`, for text with commas quote"
            f" it: `'{key}=\"...\"'`."
        )
    if key == "hydra" or key.startswith(("hydra.", "hydra/")):
        return f"Hydra's own settings have no effect here; got `{text}`. Leave it out; `trainer.run_dir` says where a run writes."
    if "." in key or isinstance(override.value(), dict):
        return None
    if key in groups:
        if text.startswith("++") or (text.startswith("+") and key in config_groups([config_package_dir()])):
            return f"A group's option is chosen without a plus sign; got `{text}`. Write `{text.lstrip('+')}`."
        value = override.value()
        chosen = value if isinstance(value, list) else [value]
        wrong = [str(option) for option in chosen if option is not None and str(option) not in groups[key]]
        return _unknown_option_problem(key, wrong[0], groups[key], root) if wrong and not override.is_delete() else None
    if key in section_keys(root):
        parts = f"Set its parts: `{key}.name=value`. {how_to_list(root)}"
        return f"`{key}` is a section, not a group with options; got `{text}`. {parts}"
    guess = nearest(key, groups)
    if guess and key not in {setting.key.rpartition(".")[2] for setting in all_settings(root)}:
        return f"`{key}` is not a group of options; got `{text}`. Did you mean `{guess}` ({', '.join(groups[guess])})?"
    return unknown_key_problem(key, root)


def _unknown_option_problem(group: str, option: str, options: Sequence[str], root: type) -> str:
    guess = nearest(option, options)
    return (
        f"`{group}` must be one of {', '.join(options)}, or null; got `{option}`. "
        + (f"Did you mean `{group}={guess}`?" if guess else "Give one of these, or leave it out.")
        + (f" Single settings are written `{group}.name=value`." if group in section_keys(root) else "")
    )


def _compose(config_name: str, overrides: list[str], config_dir: Path | None) -> DictConfig:
    try:
        with _hydra_left_as_found():
            # Not hydra.initialize_*: with two directories those find a primary file in the first one only.
            package = f"pkg://{CONFIG_PACKAGE}"
            search_path = create_config_search_path(package if config_dir is None else str(Path(config_dir).resolve()))
            if config_dir is not None:
                search_path.append(CONFIG_PACKAGE, package, anchor=SearchPathQuery("main", None))
            hydra.version.setbase(_HYDRA_VERSION_BASE)
            Hydra.create_main_hydra2("skyrl_mega", search_path)
            return hydra.compose(config_name, overrides=overrides)
    except (HydraException, OmegaConfBaseException, yaml.YAMLError, ValueError) as error:
        reasons = [_one_line(part) for part in (error, error.__cause__) if part is not None]
        raise ConfigError(
            f"The configuration files and overrides must compose; Hydra says: {'; '.join(filter(None, reasons))}. "
            "Correct the file or the override it names (docs/configuration.md lists groups and recipes)."
        ) from error


@contextlib.contextmanager
def _hydra_left_as_found() -> Iterator[None]:
    """Hydra keeps one global instance and one global version base: an application that uses Hydra itself finds them unchanged."""
    outer, outer_base = GlobalHydra.instance().hydra, VersionBase.instance().getbase()
    GlobalHydra.instance().clear()
    try:
        yield
    finally:
        GlobalHydra.instance().hydra = outer
        if isinstance(outer_base, Version):
            VersionBase.instance().setbase(outer_base)


def _require_choices_to_count(
    config_name: str, parsed: Sequence[tuple[str, Override]], directories: Sequence[Path], config_dir: Path | None
) -> None:
    """Raises ConfigError where a recipe changes what a group chosen on the command line sets: no choice is lost silently."""
    choices = [(text, o) for text, o in parsed if "." not in o.key_or_group and not isinstance(o.value(), dict)]
    groups = [(o.key_or_group, value) for _, o in choices if o.key_or_group != "recipe" and isinstance(value := o.value(), str)]
    if not groups or len(groups) == len(choices):
        return
    given = {override.key_or_group for _, override in parsed}
    composed = _compose(config_name, [text for text, _ in choices], config_dir)
    problems = []
    for group, option in groups:
        for key, value in option_values(group, option_file(group, option, directories)).items():
            final = OmegaConf.select(composed, key)
            if key not in given and final != value:
                problems.append(
                    f"A chosen group must keep its settings; `{group}={option}` sets `{key}` to {value!r}, and the recipe, which "
                    f"comes after it, to {final!r}. Say which with `{key}=...`."
                )
    if problems:
        raise ConfigError(numbered(problems))


def _resolve(composed: DictConfig, root: type) -> dict[str, Any]:
    """Plain values, with interpolations filled in; they may refer to the schema's defaults too."""
    try:
        merged = OmegaConf.merge(OmegaConf.create(as_dict(root())), composed)
        values = OmegaConf.to_container(merged, resolve=True)
    except OmegaConfBaseException as error:
        where = f"`{error.full_key}`" if error.full_key else "A section"
        raise ConfigError(
            f"{where} must resolve to a value that fits its place; {_one_line(error.msg or error)}. Check the interpolation, or"
            f" the section's shape. {how_to_list(root)}"
        ) from error
    if not isinstance(values, dict):
        raise ConfigError(f"The configuration must be a mapping of sections; got {type(values).__name__}. {how_to_list(root)}")
    return {str(key): value for key, value in values.items()}


def _one_line(message: object) -> str:
    return " ".join(str(message).split()).partition(" full_key:")[0].rstrip(".")
