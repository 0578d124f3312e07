"""A peer's own code, taken from its source and run as it is, without importing the peer.

Importing verl or TRL imports Ray, tensordict and vLLM, which takes tens of seconds, and half of TRL's formulas are inside methods
of its trainers. Their lines need torch and little else.
"""

from __future__ import annotations
import __future__

import ast
import importlib.util
import textwrap
from pathlib import Path
from typing import Any

import pytest


def source_of(module: str) -> str:
    """The source of `package.part`; the test is skipped where the package is not installed."""
    package, *parts = module.split(".")
    found = importlib.util.find_spec(package)
    if found is None or not found.submodule_search_locations:
        pytest.skip(f"{package} is not installed (pip install --no-deps --target DIR {package}; PYTHONPATH=DIR)")
    return Path(found.submodule_search_locations[0], *parts).with_suffix(".py").read_text(encoding="utf-8")


def definition_of(source: str, name: str, names: dict[str, Any]) -> Any:
    """One function or class of a module's top level, without its decorators, over the globals `names`."""
    found = [n for n in ast.parse(source).body if isinstance(n, ast.FunctionDef | ast.ClassDef) and n.name == name]
    assert len(found) == 1, f"there are {len(found)} definitions of {name}: the peer's source has changed"
    found[0].decorator_list = []
    flags = __future__.annotations.compiler_flag  # annotations name types that are not needed here
    exec(compile(ast.Module(found, []), f"<{name}>", "exec", flags=flags), names)
    return names[name]


def run_between(source: str, first: str, last: str, names: dict[str, Any]) -> dict[str, Any]:
    """The variables after running the lines from the one that begins with `first` to the one before `last`, on `names`."""
    lines = source.splitlines()
    starts = [number for number, line in enumerate(lines) if line.strip().startswith(first)]
    assert len(starts) == 1, f"{first!r} begins {len(starts)} lines: the peer's source has changed"
    end = next(number for number in range(starts[0], len(lines)) if lines[number].strip().startswith(last))
    exec(textwrap.dedent("\n".join(lines[starts[0] : end])), names)
    return names
