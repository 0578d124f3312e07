"""Which settings go with a mixture of experts: its layout, its routers, router replay. Reads no file."""

from __future__ import annotations

from collections.abc import Iterator

from skyrl_mega.config.rule import Facts, Finding, RuleBook
from skyrl_mega.config.schema import Config

# ---- how experts are laid over the processes

EXPERT_LAYOUT = RuleBook()
rule = EXPERT_LAYOUT.rule


@rule("`parallel.expert` and `parallel.expert_tensor` above 1 need a mixture of experts whose number and FFN size they divide")
def _experts_are_divisible(config: Config, facts: Facts) -> Iterator[Finding]:
    model, expert, expert_tensor = facts.model, config.parallel.expert, config.parallel.expert_tensor
    if model is None or min(expert, expert_tensor) < 1 or expert == expert_tensor == 1:
        return
    if model.experts is None:
        yield Finding(
            f"`parallel.expert` is {expert}, `parallel.expert_tensor` is {expert_tensor} and the model (`{model.family}`) is"
            " dense",
            "Set both to 1; `parallel.tensor` and `parallel.pipeline` shard dense models.",
        )
        return
    if model.experts.count % expert:
        fitting = [n for n in range(1, model.experts.count + 1) if model.experts.count % n == 0]
        yield Finding(
            f"`parallel.expert` is {expert} and the model has {model.experts.count} experts",
            f"Sizes that fit this model: {', '.join(map(str, fitting))}.",
        )
    if model.experts.ffn_size % expert_tensor:
        yield Finding(
            f"`parallel.expert_tensor` is {expert_tensor} and the experts' FFN size is {model.experts.ffn_size}",
            "Set `parallel.expert_tensor=1`.",
        )


@rule("The number of processes must be divisible by `parallel.expert` x `parallel.expert_tensor` x `parallel.pipeline`")
def _world_size_holds_experts(config: Config, facts: Facts) -> Iterator[Finding]:
    parallel = config.parallel
    size = max(1, parallel.expert * parallel.expert_tensor * parallel.pipeline)
    if facts.world_size % size:
        yield Finding(
            f"{facts.world_size} processes for {parallel.expert} x {parallel.expert_tensor} x {parallel.pipeline} = {size}",
            f"Start {size} processes or a multiple, or lower `parallel.expert`.",
        )


@rule("`parallel.tensor` > 1 with a mixture of experts needs `parallel.sequence_parallel`: each process routes its own tokens")
def _experts_need_sequence_parallel(config: Config, facts: Facts) -> Iterator[Finding]:
    model, parallel = facts.model, config.parallel
    if model is not None and model.experts is not None and parallel.tensor > 1 and not parallel.sequence_parallel:
        yield Finding(
            f"`parallel.tensor` is {parallel.tensor}, `parallel.sequence_parallel` is false and the model is `{model.family}`",
            "Set `parallel.sequence_parallel=true`, or choose `parallel=ep2_tp2`.",
        )


@rule("`parallel.expert_tensor` must be 1, or equal to `parallel.tensor` on CUDA: gloo can't gather uneven numbers of tokens")
def _expert_tensor_fits(config: Config, facts: Facts) -> Iterator[Finding]:
    parallel = config.parallel
    if parallel.expert_tensor > 1 and (config.trainer.device == "cpu" or parallel.expert_tensor != parallel.tensor):
        yield Finding(
            f"`parallel.expert_tensor` is {parallel.expert_tensor}, `parallel.tensor` is {parallel.tensor} and `trainer.device`"
            f" is {config.trainer.device}",
            "Set `parallel.expert_tensor=1` and raise `parallel.expert`.",
        )


# ---- everything else

EXPERT_COMBINATIONS = RuleBook()
rule = EXPERT_COMBINATIONS.rule


@rule("`model.moe_aux_loss_coef` and `model.moe_z_loss_coef` > 0, and `model.freeze_router`, need a mixture of experts")
def _router_settings_need_experts(config: Config, facts: Facts) -> Iterator[Finding]:
    if facts.model is None or facts.model.experts is not None:
        return
    model = config.model
    asked = {
        "model.moe_aux_loss_coef": (model.moe_aux_loss_coef, "0"),
        "model.moe_z_loss_coef": (model.moe_z_loss_coef, "0"),
        "model.freeze_router": (model.freeze_router, "false"),
    }
    for name, (value, without) in asked.items():
        if value:
            yield Finding(f"`{name}` is {value} and the model (`{facts.model.family}`) is dense", f"Set `{name}={without}`.")


@rule("`model.freeze_router` goes without losses of the router, which could then only bend what it is given")
def _frozen_routers_have_no_losses(config: Config, facts: Facts) -> Iterator[Finding]:
    model = config.model
    if model.freeze_router and (model.moe_aux_loss_coef > 0 or model.moe_z_loss_coef > 0):
        yield Finding(
            f"`model.moe_aux_loss_coef` is {model.moe_aux_loss_coef} and `model.moe_z_loss_coef` is {model.moe_z_loss_coef}",
            "Set both to 0, or `model.freeze_router=false`.",
        )


@rule(
    "`model.router_replay` needs a mixture of experts; `rollout` an engine that tells its routing: not a server of somebody else,"
    " and not one in pipeline stages"
)
def _replay_needs_routing(config: Config, facts: Facts) -> Iterator[Finding]:
    replay, rollout = config.model.router_replay, config.rollout
    if replay != "off" and facts.model is not None and facts.model.experts is None:
        yield Finding(f"it is {replay} and the model (`{facts.model.family}`) is dense", "Set `model.router_replay=off`.")
    if replay == "rollout" and rollout.external_urls:
        yield Finding(
            f"`rollout.external_urls` is {list(rollout.external_urls)}",
            "Start the engines here, or set `model.router_replay=old`.",
        )
    if replay == "rollout" and rollout.engine_pipeline > 1:
        yield Finding(f"`rollout.engine_pipeline` is {rollout.engine_pipeline}", "Set `rollout.engine_pipeline=1`.")


@rule("`model.router_replay=old` replays the pass of `algorithm.old_logprobs=policy`, made with several updates a step only")
def _old_replay_needs_its_pass(config: Config, facts: Facts) -> Iterator[Finding]:
    updates, old = config.trainer.updates_per_step, config.algorithm.old_logprobs
    if config.model.router_replay == "old" and (updates == 1 or old != "policy"):
        yield Finding(
            f"`trainer.updates_per_step` is {updates} and `algorithm.old_logprobs` is {old}",
            "Set `trainer.updates_per_step` to 2 or more and `algorithm.old_logprobs=policy`, or `model.router_replay=rollout`.",
        )


@rule(
    "`model.moe_bias_update_rate` > 0 needs routers that are trained and choose by a bias of each expert: deepseek_v3, glm4_moe"
)
def _bias_updates_need_biases(config: Config, facts: Facts) -> Iterator[Finding]:
    model, rate = facts.model, config.model.moe_bias_update_rate
    if rate > 0 and config.model.freeze_router:
        yield Finding(f"it is {rate} and `model.freeze_router` is true", "Set one of them to its default.")
    if rate > 0 and model is not None and (model.experts is None or not model.experts.has_bias):
        yield Finding(
            f"it is {rate} and the model is `{model.family}`",
            "Set `model.moe_bias_update_rate=0`; `model.moe_aux_loss_coef` balances other mixtures.",
        )
