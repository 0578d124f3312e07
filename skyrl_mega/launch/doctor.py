"""`skyrl-mega doctor`: what this machine has, which backend each part will use, and what to do where the main job can't run."""

from __future__ import annotations

import dataclasses
import itertools
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TextIO

from skyrl_mega.config.schema import Config
from skyrl_mega.config.validate import find_problems
from skyrl_mega.errors import MissingDependencyError
from skyrl_mega.launch.checks import Check, all_checks
from skyrl_mega.launch.machine import look_around

_COLOURS = {"ok": "green", "warn": "yellow", "fail": "bold red"}
_SECTION_TITLES = {"machine": "Machine", "software": "Software", "backends": "Will be used", "settings": "Settings"}


def run_doctor(config: Config | None = None, *, world_size: int = 1, as_json: bool = False, output: TextIO | None = None) -> int:
    """Prints the report and returns the exit code: 0 where the main job can run, 1 where something must be done first.

    `config` is judged too where it is given; without it the schema's defaults say which backends are meant.
    """
    stream: TextIO = output if output is not None else sys.stdout
    settings = config or Config()
    checks = all_checks(look_around(Path(settings.trainer.run_dir)), settings)
    if config is not None:
        checks.extend(settings_checks(config, world_size))
    can_run = all(check.status != "fail" for check in checks)
    if as_json:
        json.dump({"can_run": can_run, "checks": [dataclasses.asdict(check) for check in checks]}, stream, indent=2)
        stream.write("\n")
    else:
        render(checks, stream)
    return 0 if can_run else 1


def settings_checks(config: Config, world_size: int) -> list[Check]:
    """One row per broken rule and per warning of the configuration; their messages hold the remedy already."""
    problems, warnings = find_problems(config, world_size=world_size)
    rows = [Check("settings", "rule", "fail", problem) for problem in problems]
    rows += [Check("settings", "rule", "warn", warning) for warning in warnings]
    return rows or [Check("settings", "rules", "ok", "all hold")]


def render(checks: Sequence[Check], output: TextIO) -> None:
    """The rows by section, then what to do, most urgent first."""
    try:
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text
    except ImportError as error:
        raise MissingDependencyError(
            "The report is drawn with the package rich, which is not installed; run `pip install -e .` in the project's root, or"
            " use `skyrl-mega doctor --json`."
        ) from error

    def grid(*widths: int | None) -> Table:
        table = Table.grid(padding=(0, 2))
        for width in widths:
            table.add_column(width=width, overflow="fold")
        return table

    console = Console(file=output, highlight=False)
    for section, rows in itertools.groupby(checks, key=lambda check: check.section):
        console.print(Text(_SECTION_TITLES[section], "bold"))
        table = grid(5, 16, None)
        for check in rows:
            table.add_row(Text(f" {check.status}", _COLOURS[check.status]), check.name, Text(check.found))
        console.print(table)
        console.print()
    to_do = sorted((check for check in checks if check.remedy), key=lambda check: check.status != "fail")
    if to_do:
        console.print(Text("What to do", "bold"))
        table = grid(5, 16, None)
        for number, check in enumerate(to_do, start=1):
            table.add_row(f" {number}.", Text(check.name, _COLOURS[check.status]), Text(check.remedy))
        console.print(table)
        console.print()
    if any(check.status == "fail" for check in checks):
        console.print(Text("The main job can't run here yet.", "bold red"))
    else:
        console.print(Text("The main job can run here: skyrl-mega train recipe=quickstart", "bold green"))
