"""Which settings of the algorithm go together: advantages, losses, KL, off-policy stages, and what is trained on. Reads no file.

What a function's options may be is the function's own knowledge (`algorithms.check`); here are rules between settings.
"""

from __future__ import annotations

from collections.abc import Iterator

from skyrl_mega.config.rule import Facts, Finding, RuleBook
from skyrl_mega.config.schema import Config

ALGORITHM_COMBINATIONS = RuleBook()
rule = ALGORITHM_COMBINATIONS.rule

# ---- advantages and the distance to the reference -------------------------------------------------------------------------


#: Built-in estimators that compare the samples of a prompt.
COMPARE_SAMPLES = frozenset(
    {
        *("grpo", "dr_grpo", "gpg", "rloo", "opo", "maxrl", "gdpo", "grpo_passk", "pass_at_k", "reinforce_plus_plus_baseline"),
        *("turn_grpo", "step_grpo", "gigpo"),
    }
)


@rule(
    "`trainer.samples_per_prompt` must be at least 2 for an `algorithm.advantage` that compares a prompt's samples: one has no"
    " spread"
)
def _groups_have_spread(config: Config, facts: Facts) -> Iterator[Finding]:
    samples, advantage = config.trainer.samples_per_prompt, config.algorithm.advantage
    if samples == 1 and advantage in COMPARE_SAMPLES:
        yield Finding(f"got 1 for {advantage}", "Set `trainer.samples_per_prompt=8`.")


@rule("`algorithm.advantage=pass_at_k` compares attempts of `k` samples: `trainer.samples_per_prompt` must be greater")
def _attempts_differ(config: Config, facts: Facts) -> Iterator[Finding]:
    k, samples = config.algorithm.advantage_options.get("k", 4), config.trainer.samples_per_prompt
    if config.algorithm.advantage == "pass_at_k" and isinstance(k, int) and k >= samples:
        yield Finding(
            f"`algorithm.advantage_options.k` is {k} and `trainer.samples_per_prompt` is {samples}",
            f"Set `trainer.samples_per_prompt={2 * k}`, or `algorithm.advantage_options.k={max(1, samples // 2)}`.",
        )


@rule("`algorithm.kl.target` > 0 steers a coefficient that begins at `algorithm.kl.coef`, which must be above 0")
def _adaptive_kl_has_a_beginning(config: Config, facts: Facts) -> Iterator[Finding]:
    if config.algorithm.kl.target > 0 and config.algorithm.kl.coef == 0:
        yield Finding("`algorithm.kl.coef` is 0", "Set `algorithm.kl.coef=0.05`, or `algorithm.kl.target=0`.")


@rule("`algorithm.kl.horizon` must be at least the samples of a step, so that a step changes the coefficient by at most a fifth")
def _kl_horizon_holds_a_step(config: Config, facts: Facts) -> Iterator[Finding]:
    kl, samples = config.algorithm.kl, config.trainer.prompts_per_step * config.trainer.samples_per_prompt
    if kl.target > 0 and kl.horizon < samples:
        yield Finding(f"it is {kl.horizon} for {samples} samples", f"Set `algorithm.kl.horizon={100 * samples}`.")


@rule("`algorithm.kl.place=reward` needs an `algorithm.advantage` that takes any reward: not gdpo, and not maxrl")
def _advantage_takes_kl_in_reward(config: Config, facts: Facts) -> Iterator[Finding]:
    algorithm = config.algorithm
    reasons = {"gdpo": "looks at the reward's parts only", "maxrl": "divides by the mean reward, which a penalty makes negative"}
    if algorithm.kl.coef > 0 and algorithm.kl.place == "reward" and algorithm.advantage in reasons:
        yield Finding(
            f"`algorithm.advantage` is {algorithm.advantage}, which {reasons[algorithm.advantage]}",
            "Set `algorithm.kl.place=loss`.",
        )


@rule("`teacher.url` gives log-probabilities at temperature 1, and needs `teacher.path` for the vocabulary")
def _served_teacher_judges_the_sampler(config: Config, facts: Facts) -> Iterator[Finding]:
    if not config.teacher.url:
        return
    if not config.teacher.path:
        yield Finding("`teacher.path` is empty", "Set it to the directory of the served model; no weights are read there.")
    if config.rollout.temperature != 1.0:
        yield Finding(
            f"`rollout.temperature` is {config.rollout.temperature}",
            "Set `rollout.temperature=1.0`, or load the teacher here (no `teacher.url`).",
        )


@rule("`algorithm.advantage_options.reward_weight` of a distillation compares a prompt's samples: one has no spread")
def _teacher_and_reward_compare_samples(config: Config, facts: Facts) -> Iterator[Finding]:
    algorithm, samples = config.algorithm, config.trainer.samples_per_prompt
    weight = algorithm.advantage_options.get("reward_weight", 0.0) if algorithm.advantage == "distill" else 0.0
    if weight and samples == 1:
        yield Finding(f"it is {weight} and `trainer.samples_per_prompt` is 1", "Set `trainer.samples_per_prompt=8`.")


# ---- losses and staleness -------------------------------------------------------------------------------------------------


#: Built-in losses whose ratio is taken against the engine that sampled, whatever `algorithm.old_logprobs` says.
AGAINST_SAMPLER = frozenset({"dppo_tv", "dppo_kl"})
#: Built-in losses whose papers average over sequences.
OVER_SEQUENCES = frozenset({"gspo", "gspo_token", "gmpo", "sapo"})


@rule("`algorithm.reduction=sequence_mean` is the objective of gspo, gmpo and sapo; others weigh long responses more")
def _sequence_losses_average_sequences(config: Config, facts: Facts) -> Iterator[Finding]:
    algorithm = config.algorithm
    if algorithm.policy_loss in OVER_SEQUENCES and algorithm.reduction != "sequence_mean":
        yield Finding(
            f"{algorithm.policy_loss} with {algorithm.reduction}", "Set `algorithm.reduction=sequence_mean`.", is_warning=True
        )


@rule("`trainer.max_staleness` > 0 trains on what older policies sampled, which `algorithm.off_policy.stages` account for")
def _stale_samples_are_corrected(config: Config, facts: Facts) -> Iterator[Finding]:
    algorithm = config.algorithm
    if algorithm.policy_loss in AGAINST_SAMPLER:
        return
    if config.trainer.max_staleness > 0 and not algorithm.off_policy.stages and algorithm.old_logprobs == "policy":
        yield Finding(
            f"`trainer.max_staleness` is {config.trainer.max_staleness} and there is no stage",
            "Set `algorithm.old_logprobs=rollout`, or `'algorithm.off_policy.stages=[{name: truncated_is}]'`.",
            is_warning=True,
        )


@rule("The off-policy stage staleness_decay weighs tokens by age, which takes `trainer.max_staleness` > 0")
def _decay_needs_age(config: Config, facts: Facts) -> Iterator[Finding]:
    names = [stage.get("name") for stage in config.algorithm.off_policy.stages]
    if "staleness_decay" in names and config.trainer.max_staleness == 0:
        yield Finding(
            "`trainer.max_staleness` is 0: every token is fresh, and the stage changes nothing",
            "Leave it out of `algorithm.off_policy.stages`, or raise `trainer.max_staleness`.",
            is_warning=True,
        )


# ---- sampling -------------------------------------------------------------------------------------------------------------


@rule("`sampling.dynamic` compares the rewards of a group, so `trainer.samples_per_prompt` must be at least 2")
def _dynamic_sampling_compares(config: Config, facts: Facts) -> Iterator[Finding]:
    if config.sampling.dynamic and config.trainer.samples_per_prompt == 1:
        yield Finding("got 1", "Set `trainer.samples_per_prompt=8`, or `sampling.dynamic=false`.")


@rule("`sampling.curriculum=success` needs prompts that come again: rows, or the first `data.limit` prompts of a generator")
def _curriculum_prompts_return(config: Config, facts: Facts) -> Iterator[Finding]:
    data = config.data
    if config.sampling.curriculum == "success" and data.source == "generator" and data.limit == 0:
        yield Finding(
            "`data.source` is generator and `data.limit` is 0: that stream has no end and no prompt twice",
            "Set `data.limit=1000`, `data.source=jsonl data.path=FILE`, or `sampling.curriculum=none`.",
        )


@rule("`sampling.reward.clip` must be empty, or two bounds [low, high] with low < high")
def _reward_bounds_are_ordered(config: Config, facts: Facts) -> Iterator[Finding]:
    clip = config.sampling.reward.clip
    if clip and (len(clip) != 2 or clip[0] >= clip[1]):
        yield Finding(f"got {list(clip)}", "Set `sampling.reward.clip=[0,1]`, or leave it out.")


@rule("`sampling.overlong.penalty_tokens` must be less than `rollout.max_new_tokens`: they are the last ones of a turn")
def _overlong_penalty_fits(config: Config, facts: Facts) -> Iterator[Finding]:
    tokens, longest = config.sampling.overlong.penalty_tokens, config.rollout.max_new_tokens
    if tokens >= longest:
        yield Finding(f"{tokens} of {longest}", f"Set `sampling.overlong.penalty_tokens={longest // 5}`, or 0 for no penalty.")


@rule("`sampling.zero_variance=drop` goes by advantages of exactly 0, which `algorithm.normalize_advantages` would move")
def _zero_advantages_stay_zero(config: Config, facts: Facts) -> Iterator[Finding]:
    if config.sampling.zero_variance == "drop" and config.algorithm.normalize_advantages:
        yield Finding("both are set", "Set `sampling.zero_variance=keep`, or `algorithm.normalize_advantages=false`.")


@rule("`sampling.replay.share` > 0 trains on what older policies sampled, which `algorithm.off_policy.stages` must account for")
def _replays_are_corrected(config: Config, facts: Facts) -> Iterator[Finding]:
    algorithm = config.algorithm
    if config.sampling.replay.share > 0 and not algorithm.off_policy.stages and algorithm.old_logprobs == "policy":
        yield Finding(
            f"`sampling.replay.share` is {config.sampling.replay.share:g} and there is no stage",
            "Set `'algorithm.off_policy.stages=[{name: truncated_is}]'`, or `sampling.replay.share=0`.",
        )


@rule(
    "`sampling.replay.share` x `trainer.prompts_per_step` must be a whole number of groups that `trainer.updates_per_step`"
    " divides: every update trains equally many"
)
def _replays_divide_into_updates(config: Config, facts: Facts) -> Iterator[Finding]:
    share, prompts, updates = config.sampling.replay.share, config.trainer.prompts_per_step, config.trainer.updates_per_step
    groups = share * prompts
    if share <= 0 or updates < 1 or prompts < 1:
        return
    if abs(groups - round(groups)) > 1e-6 or round(groups) % updates:
        nearest = max(1, round(groups / updates)) * updates / prompts
        yield Finding(
            f"{share:g} x {prompts} = {groups:g} groups for {updates} updates", f"Set `sampling.replay.share={nearest:g}`."
        )
