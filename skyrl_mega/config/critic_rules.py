"""Which settings of a critic go together, with its model's shape and with the number of processes. Reads no file."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from skyrl_mega.config.critic import critic_config
from skyrl_mega.config.expert_rules import EXPERT_LAYOUT
from skyrl_mega.config.layout_rules import LAYOUT_COMBINATIONS
from skyrl_mega.config.rule import Facts, Finding, RuleBook
from skyrl_mega.config.schema import Config

CRITIC_COMBINATIONS = RuleBook()
rule = CRITIC_COMBINATIONS.rule


@rule("The critic's layout must fit its model and the number of processes, as the policy's must")
def _layout_fits_critic(config: Config, facts: Facts) -> Iterator[Finding]:
    own = critic_config(config)
    own_facts = replace(facts, model=facts.critic or facts.model)
    for checked in (*LAYOUT_COMBINATIONS, *EXPERT_LAYOUT):
        said_of_policy = list(checked.check(config, facts))
        for finding in checked.check(own, own_facts):
            if finding not in said_of_policy:
                values, remedy = _of_critic(f"{checked.statement}; {finding.values}"), _of_critic(finding.remedy)
                yield replace(finding, values=values, remedy=f"{remedy} (0 there is the policy's.)")


def _of_critic(message: str) -> str:
    return message.replace("`parallel.", "`critic.parallel.")


@rule("The model of `critic.path` must know as many positions as `rollout.max_model_len`, and the tokens of the policy")
def _critic_reads_what_the_policy_writes(config: Config, facts: Facts) -> Iterator[Finding]:
    critic, longest = facts.critic, config.rollout.max_model_len
    if critic is None:
        return
    if longest > critic.max_position_embeddings:
        known = critic.max_position_embeddings
        yield Finding(f"it knows {known} of {longest} positions", f"Set `rollout.max_model_len={known}` or less.")
    if facts.model is not None and critic.vocab_size != facts.model.vocab_size:
        yield Finding(
            f"its vocabulary has {critic.vocab_size} entries, the policy's {facts.model.vocab_size}",
            "Make sure that both have the same tokenizer (some families pad the vocabulary differently by size).",
            is_warning=True,
        )


@rule("`critic.warmup_steps` must leave steps to the policy: fewer than `trainer.max_steps`")
def _warmup_ends(config: Config, facts: Facts) -> Iterator[Finding]:
    warmup, last = config.critic.warmup_steps, config.trainer.max_steps
    if warmup >= last:
        yield Finding(f"{warmup} of {last} steps", "Lower `critic.warmup_steps`, or raise `trainer.max_steps`.")


@rule("`trainer.record_steps` records updates of the policy, and the first `critic.warmup_steps` steps have none")
def _recorded_steps_train_the_policy(config: Config, facts: Facts) -> Iterator[Finding]:
    early = [step for step in config.trainer.record_steps if 1 <= step <= config.critic.warmup_steps]
    if early:
        yield Finding(f"{', '.join(map(str, early))} of {config.critic.warmup_steps} such steps", "Record later ones.")
