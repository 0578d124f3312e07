"""Names in a configuration become functions, ours or the user's own, with their options bound and checked.

A function's keyword-only parameters are its options: `algorithm.loss_options.clip_low=0.1` sets the `clip_low` of

    @POLICY_LOSSES.register("ppo_clip", token_separable=True)
    def ppo_clip(inputs, *, clip_low: float = 0.2, clip_high: float = 0.28): ...

A function of one's own is named by where it is: `algorithm.policy_loss=my_losses.py:my_loss`, or `package.module:my_loss`.
It may be decorated to declare its traits; a plain function has none.
"""

from __future__ import annotations

import difflib
import functools
import importlib
import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from skyrl_mega.config.user_functions import load_function
from skyrl_mega.errors import ConfigError

Value = TypeVar("Value")
Function = TypeVar("Function", bound=Callable[..., Any])


def lookup(registry: Mapping[str, Value], name: str, setting: str) -> Value:
    """The entry called `name`. Raises ConfigError naming `setting`, the nearest known name and all known names."""
    if name in registry:
        return registry[name]
    raise ConfigError(f"{setting} ({name!r}) must be one of {', '.join(sorted(registry))}.{_nearest(name, registry)}")


@dataclass(frozen=True)
class Entry(Generic[Function]):
    """A registered function. `traits` are what its registry knows to ask about it (`needs`, `token_separable` ...)."""

    name: str
    function: Function
    traits: Mapping[str, Any] = field(default_factory=dict)

    def bind(self, options: Mapping[str, Any], setting: str) -> Callable[..., Any]:
        """The function with `options` as keyword arguments.

        Raises ConfigError for an option that it does not have, or of another type than its annotation says; `setting` is named.
        """
        known = {
            name: parameter
            for name, parameter in inspect.signature(self.function, eval_str=True).parameters.items()
            if parameter.kind is inspect.Parameter.KEYWORD_ONLY
        }
        for name, value in options.items():
            if name not in known:
                has = f"{self.name} has {', '.join(known)}" if known else f"{self.name} has no options"
                raise ConfigError(f"`{setting}.{name}` is not an option: {has}.{_nearest(name, known)}")
            _require_type(f"{setting}.{name}", value, known[name].annotation)
        missing = [name for name, p in known.items() if p.default is inspect.Parameter.empty and name not in options]
        if missing:
            raise ConfigError(f"{self.name} needs `{setting}.{missing[0]}`; set it.")
        return functools.partial(self.function, **options) if options else self.function


class Registry(Mapping[str, Entry[Function]]):
    """The functions that the setting `setting` may name.

    `modules`: where the built-in ones are; a module is imported when one of its names is looked up. `traits`: what may be
    declared, with defaults.
    """

    def __init__(self, setting: str, modules: Mapping[str, str], traits: Mapping[str, Any]) -> None:
        self.setting, self._modules, self._traits = setting, modules, traits
        self._entries: dict[str, Entry[Function]] = {}

    def register(self, name: str, **traits: Any) -> Callable[[Function], Function]:
        """A decorator. Raises ConfigError for a trait that this registry has not, or a name that another function has."""
        unknown = set(traits) - set(self._traits)
        if unknown:
            raise ConfigError(
                f"{name}: {sorted(unknown)} can't be declared for {self.setting}; traits: {', '.join(self._traits)}."
            )

        def add(function: Function) -> Function:
            taken = self._entries.get(name)
            if taken is not None and _place(taken.function) != _place(function):
                raise ConfigError(f"the name {name!r} of {self.setting} is taken by {_place(taken.function)}; choose another.")
            self._entries[name] = Entry(name, function, {**self._traits, **traits})
            return function

        return add

    def find(self, name: str) -> Entry[Function]:
        """The entry of a registered name, of `module:function` or of `file.py:function`. Raises ConfigError where there is
        none.
        """
        if ":" in name:
            function = load_function(name, self.setting)
            declared = [entry for entry in self._entries.values() if entry.function is function]
            return declared[0] if declared else Entry(name, function, self._traits)
        if name in self._modules and name not in self._entries:
            importlib.import_module(self._modules[name])
        if name in self._entries:
            return self._entries[name]
        raise ConfigError(
            f"{self.setting} ({name!r}) must be one of {', '.join(sorted(self))}, or a function of your own, as in "
            f"`{self.setting}=my_file.py:function`.{_nearest(name, self)}"
        )

    @property
    def built_in(self) -> tuple[str, ...]:
        """The names that come with the package."""
        return tuple(self._modules)

    def __getitem__(self, name: str) -> Entry[Function]:
        try:
            return self.find(name)
        except ConfigError as error:
            raise KeyError(name) from error

    def __iter__(self) -> Iterator[str]:
        return iter({**self._modules, **self._entries})

    def __len__(self) -> int:
        return len({**self._modules, **self._entries})


def _require_type(key: str, value: Any, annotation: Any) -> None:
    accepted = {float: (int, float), int: (int,), bool: (bool,), str: (str,)}.get(annotation)
    if accepted is None:  # no annotation, or one that a configuration file can't be held to
        return
    is_stray_bool = isinstance(value, bool) and annotation is not bool
    if not isinstance(value, accepted) or is_stray_bool:
        raise ConfigError(f"`{key}` must be {annotation.__name__}; got {value!r} ({type(value).__name__}).")


def _nearest(name: str, known: Any) -> str:
    near = difflib.get_close_matches(name, list(known), n=1)
    return f" Did you mean {near[0]!r}?" if near else ""


def _place(function: Callable[..., Any]) -> str:
    return f"{function.__module__}:{getattr(function, '__qualname__', function)}"
