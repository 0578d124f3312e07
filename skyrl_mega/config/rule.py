"""What a validation rule is: a sentence for the reference, and a function that finds where a configuration breaks it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from skyrl_mega.config.model_files import ModelFiles
from skyrl_mega.config.schema import Config


@dataclass(frozen=True)
class Facts:
    """What a rule may look at besides the configuration. `model` is None where its files were not, or could not be, read.

    `critic` is the model of `critic.path`; None also where the critic begins with the policy's.
    """

    world_size: int
    model: ModelFiles | None
    critic: ModelFiles | None = None


@dataclass(frozen=True)
class Finding:
    """One breach: the values that broke the rule and what to do. A warning lets the run start."""

    values: str
    remedy: str
    is_warning: bool = False


Check = Callable[[Config, Facts], Iterator[Finding]]


@dataclass(frozen=True)
class Rule:
    """`statement` is a sentence without its full stop; it opens every message of the rule."""

    statement: str
    check: Check

    def messages(self, config: Config, facts: Facts) -> Iterator[tuple[str, bool]]:
        """(message, is_warning) of every breach."""
        for finding in self.check(config, facts):
            yield f"{self.statement}; {finding.values}. {finding.remedy}", finding.is_warning


class RuleBook(list[Rule]):
    """Rules in the order they were written down."""

    def rule(self, statement: str) -> Callable[[Check], Check]:
        """Registers the decorated check under `statement`."""

        def register(check: Check) -> Check:
            self.append(Rule(statement, check))
            return check

        return register
