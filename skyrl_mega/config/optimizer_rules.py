"""Which settings of optimizers and learning-rate schedules go together. Reads no file."""

from __future__ import annotations

from collections.abc import Iterator

from skyrl_mega.config.learning_rate import critic_updates, policy_updates
from skyrl_mega.config.rule import Facts, Finding, RuleBook
from skyrl_mega.config.schema import Config, OptimizerConfig

OPTIMIZER_COMBINATIONS = RuleBook()
rule = OPTIMIZER_COMBINATIONS.rule


def _optimizers(config: Config) -> Iterator[tuple[str, OptimizerConfig, int]]:
    """(what the configuration calls it, its settings, the updates that the run plans for it)."""
    yield "optimizer", config.optimizer, policy_updates(config, has_critic=True)
    yield "critic.optimizer", config.critic.optimizer, critic_updates(config)


@rule(
    "A falling learning rate's `optimizer.warmup_updates` and `optimizer.decay_updates` must fit into `optimizer.total_updates`,"
    " or into the updates of the run"
)
def schedule_fits(config: Config, facts: Facts) -> Iterator[Finding]:
    for section, settings, planned in _optimizers(config):
        total = settings.total_updates or planned
        wanted = settings.warmup_updates + max(1, settings.decay_updates)
        if settings.schedule != "constant" and wanted > total:
            yield Finding(
                f"`{section}.schedule` is {settings.schedule} with {settings.warmup_updates} updates of warm-up and"
                f" {settings.decay_updates or 'at least 1'} of decay, of {total}",
                f"Lower `{section}.warmup_updates` or `{section}.decay_updates`, or raise `trainer.max_steps`.",
            )


@rule("With `optimizer.wsd_decay=exponential` a learning rate falls exponentially to a floor above 0")
def _exponential_has_a_floor(config: Config, facts: Facts) -> Iterator[Finding]:
    for section, settings, _ in _optimizers(config):
        if settings.schedule == "wsd" and settings.wsd_decay == "exponential" and settings.min_lr_ratio == 0:
            yield Finding(f"`{section}.min_lr_ratio` is 0", f"Set `{section}.min_lr_ratio=0.01`, say, or another `wsd_decay`.")


@rule("`optimizer.decay_updates`, `optimizer.total_updates` and `optimizer.min_lr_ratio` belong to a learning rate that falls")
def _constant_rate_does_not_fall(config: Config, facts: Facts) -> Iterator[Finding]:
    for section, settings, _ in _optimizers(config):
        values = {name: getattr(settings, name) for name in ("decay_updates", "total_updates", "min_lr_ratio")}
        given = [f"`{section}.{name}`" for name, value in values.items() if value]
        if settings.schedule == "constant" and given:
            yield Finding(
                f"`{section}.schedule` is constant, and {' and '.join(given)} would change nothing",
                f"Set `{section}.schedule=cosine`.",
            )


@rule("Muon works on whole matrices, and the distributed optimizer cuts them: it needs `parallel.distributed_optimizer=false`")
def _muon_is_not_distributed(config: Config, facts: Facts) -> Iterator[Finding]:
    for section, settings, _ in _optimizers(config):
        if settings.name == "muon" and config.parallel.distributed_optimizer:
            yield Finding(
                f"`{section}.name` is muon and `parallel.distributed_optimizer` is true",
                f"Set `parallel.distributed_optimizer=false`, or `{section}.name=adamw`.",
            )
