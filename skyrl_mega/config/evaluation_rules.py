"""Which settings of evaluations go together. Reads no file."""

from __future__ import annotations

import re
from collections.abc import Iterator

from skyrl_mega.config.ranges import section_problems
from skyrl_mega.config.rule import Facts, Finding, RuleBook
from skyrl_mega.config.schema import Config

EVALUATION_COMBINATIONS = RuleBook()
rule = EVALUATION_COMBINATIONS.rule

_TASK_NAME = re.compile(r"[A-Za-z0-9_.-]+")


@rule("Several samples of a prompt differ only at an `evaluation.temperature` above 0")
def _evaluation_samples_differ(config: Config, facts: Facts) -> Iterator[Finding]:
    settings = config.evaluation
    most = max([settings.samples_per_prompt, *(task.samples_per_prompt for task in settings.tasks)])
    if settings.temperature == 0 and most > 1:
        yield Finding(f"{most} samples of each, greedily", "Set `evaluation.temperature=0.8`, say, or take one sample.")


@rule("`evaluation.tasks` have names of their own, of letters, digits, `_`, `-` and `.`")
def _tasks_have_names(config: Config, facts: Facts) -> Iterator[Finding]:
    names = [task.name for task in config.evaluation.tasks]
    bad = sorted({name for name in names if names.count(name) > 1 or not _TASK_NAME.fullmatch(name)})
    if bad:
        yield Finding(f"not so {', '.join(map(repr, bad))}", "Rename them: metrics are called eval/<name>/accuracy.")


@rule("The numbers of `evaluation.tasks` must be in the ranges of the settings that they stand for")
def _task_numbers(config: Config, facts: Facts) -> Iterator[Finding]:
    for task in config.evaluation.tasks:
        for name, value in {"num_prompts": task.num_prompts, "samples_per_prompt": task.samples_per_prompt}.items():
            if value < 0:
                yield Finding(f"{name} of {task.name} is {value}", "0 stands for that of `evaluation`.")
        for problem in section_problems("env", task.env):
            yield Finding(f"in {task.name}, {problem}", "Correct it there.")
