"""Whether a configuration can work here, said before anything heavy is imported.

Four kinds of rules: single numbers (`ranges.py`), settings that go together (`combinations.py`), the model's files
(`model_files.py`), and what must exist on the machine (`surroundings.py`). Those of single sections are in files of their own, as
`lora_rules.py`; `rules.py` lists them all. What the machine's hardware can run is for `skyrl-mega doctor` to say: nothing here
imports torch.
"""

from __future__ import annotations

from pathlib import Path

from skyrl_mega.config.build import numbered
from skyrl_mega.config.model_files import inspect_model
from skyrl_mega.config.ranges import range_problems
from skyrl_mega.config.rule import Facts
from skyrl_mega.config.rules import ALL_COMBINATIONS, ALL_SURROUNDINGS
from skyrl_mega.config.schema import Config
from skyrl_mega.errors import ConfigError


def validate(config: Config, *, world_size: int = 1, check_files: bool = True, check_surroundings: bool = True) -> list[str]:
    """Warnings about settings that work and are probably not meant; each states rule, values and remedy.

    Raises one ConfigError that lists every broken rule. `check_files=False` leaves out all that looks at the disk or at
    installed packages (and with it the rules that need the model's shape); `check_surroundings=False` leaves out all of that
    but the model's files. Every rank may call it; it writes nothing.
    """
    problems, warnings = find_problems(
        config, world_size=world_size, check_files=check_files, check_surroundings=check_surroundings
    )
    if problems:
        raise ConfigError(numbered(problems))
    return warnings


def find_problems(
    config: Config, *, world_size: int = 1, check_files: bool = True, check_surroundings: bool = True
) -> tuple[list[str], list[str]]:
    """(messages of broken rules, warnings): what `validate` raises and returns."""
    if world_size < 1:
        raise ConfigError(
            f"The number of processes must be at least 1; got {world_size}. Unset WORLD_SIZE, or start with torchrun."
        )
    problems = list(range_problems(config))
    warnings: list[str] = []
    model = critic = None
    if check_files:
        model, model_problems = inspect_model(Path(config.model.path))
        problems.extend(model_problems)
        if config.critic.path:
            critic, critic_problems = inspect_model(Path(config.critic.path), "critic.path", needs_tokenizer=False)
            problems.extend(critic_problems)
    facts = Facts(world_size=world_size, model=model, critic=critic)
    surroundings = ALL_SURROUNDINGS if check_files and check_surroundings else ()
    for rule in (*ALL_COMBINATIONS, *surroundings):
        for message, is_warning in rule.messages(config, facts):
            (warnings if is_warning else problems).append(message)
    return problems, warnings
