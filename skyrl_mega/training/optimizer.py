"""AdamW over Megatron's gradient buffers: construction, learning-rate schedule, one guarded step.

On CPU Megatron-Core falls back to torch's AdamW; two of its habits are mended here. Its state is filled at construction, so
that memory is at its peak before the first step and a checkpoint can be taken (and loaded) before any update. And torch's
fused CPU kernel is switched on: one pass over memory instead of ten.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from skyrl_mega.config.schema import OptimizerConfig
from skyrl_mega.errors import NumericsError

if TYPE_CHECKING:
    import torch
    from megatron.core.distributed import DistributedDataParallel
    from megatron.core.optimizer import MegatronOptimizer


def learning_rate(config: OptimizerConfig, update: int) -> float:
    """The learning rate of optimizer update number `update` (from 0): linear warm-up, then constant."""
    if update < config.warmup_updates:
        return config.lr * (update + 1) / config.warmup_updates
    return config.lr


def build_optimizer(
    config: OptimizerConfig,
    chunks: list[DistributedDataParallel],
    *,
    dtype: torch.dtype,
    distributed: bool,
    overlap_param_gather: bool,
) -> MegatronOptimizer:
    """Megatron's optimizer over `chunks`; every setting of `config` reaches AdamW. All ranks call.

    bfloat16 parameters get float32 masters; `distributed` shards masters and moments over the data-parallel ranks.
    """
    import torch
    from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
    from megatron.core.optimizer import get_megatron_optimizer, get_standard_config_overrides

    megatron_config = MegatronOptimizerConfig(
        optimizer="adam",
        lr=config.lr,
        adam_beta1=config.beta1,
        adam_beta2=config.beta2,
        adam_eps=config.eps,
        weight_decay=config.weight_decay,
        clip_grad=config.clip_grad_norm,
        bf16=dtype == torch.bfloat16,
        params_dtype=dtype,
        use_distributed_optimizer=distributed,
        overlap_param_gather=overlap_param_gather,
    )
    # The standard overrides exempt norms and biases from weight decay; Megatron applies none unless asked.
    optimizer = get_megatron_optimizer(megatron_config, chunks, config_overrides=get_standard_config_overrides(megatron_config))
    _use_fused_kernel(torch_optimizers(optimizer))
    for inner in torch_optimizers(optimizer):
        for group in inner.param_groups:
            for parameter in group["params"]:
                inner.state[parameter] = {
                    # Where the parameter is: the fused kernels count on the device.
                    "step": torch.zeros((), device=parameter.device),
                    "exp_avg": torch.zeros_like(parameter),
                    "exp_avg_sq": torch.zeros_like(parameter),
                }
    return optimizer


def torch_optimizers(optimizer: MegatronOptimizer) -> list[torch.optim.AdamW]:
    """The torch AdamW instances underneath; empty where TransformerEngine's or Apex's FusedAdam is used."""
    import torch

    inner = [part.optimizer for part in optimizer.chained_optimizers]
    return [part for part in inner if isinstance(part, torch.optim.AdamW)]


#: Moments are stored per parameter, so that any layout can load them.
_CHECKPOINT_FORMAT = {"distrib_optim_sharding_type": "fully_reshardable", "distrib_optim_fully_reshardable_mem_efficient": False}


def sharded_state(optimizer: MegatronOptimizer, model_state: dict[str, Any], *, loading: bool) -> dict[str, Any]:
    """The optimizer's part of a Megatron dist checkpoint. All ranks call."""
    return optimizer.sharded_state_dict(model_state, is_loading=loading, metadata=_CHECKPOINT_FORMAT)


def load_state(optimizer: MegatronOptimizer, state: dict[str, Any]) -> None:
    """Restores what `sharded_state` described, once it is loaded.

    `DistributedOptimizer` copies every entry of a parameter's state from the checkpoint, and torch's AdamW, unlike the fused
    Adams it was written for, keeps its step count there; the checkpoint holds that count once, in the parameter groups. So
    the count is out of the way while a parameter's moments are copied.
    """
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    inner = torch_optimizers(optimizer)
    patched = [
        part for part in optimizer.chained_optimizers if isinstance(part, DistributedOptimizer) and part.optimizer in inner
    ]
    for part in patched:

        def set_states(model_param: torch.Tensor, tensors: dict, part: DistributedOptimizer = part) -> None:
            group, order = part.model_param_group_index_map[model_param]
            state = part.optimizer.state[part.optimizer.param_groups[group]["params"][order]]
            count = state.pop("step")
            type(part)._set_main_param_and_optimizer_states(part, model_param, tensors)
            state["step"] = count

        part._set_main_param_and_optimizer_states = set_states
    try:
        optimizer.load_state_dict(state)
    finally:
        for part in patched:
            del part._set_main_param_and_optimizer_states
    for adamw in inner:
        for state_of_one in adamw.state.values():
            # Megatron gives all parameters one and the same step tensor; AdamW adds 1 to it for each of them.
            state_of_one["step"] = state_of_one["step"].clone()
    _use_fused_kernel(inner)


def step(optimizer: MegatronOptimizer, config: OptimizerConfig, update: int) -> tuple[float, float]:
    """Clips and applies the accumulated gradients; returns (gradient norm before clipping, learning rate). All ranks call.

    Raises NumericsError, with the weights untouched, if the gradient norm is not finite.
    """
    lr = learning_rate(config, update)
    for group in optimizer.param_groups:
        # Megatron leaves the multiplier to its scheduler; without it norms and biases would be decayed too.
        group["lr"] = lr
        group["weight_decay"] = config.weight_decay * group["wd_mult"]
    overflow = optimizer.prepare_grads()
    grad_norm = float(optimizer.get_grad_norm())
    if overflow or not math.isfinite(grad_norm):
        raise NumericsError(
            f"the gradient norm of update {update} is {grad_norm}: the step was not applied. The last checkpoint is good; "
            "lower optimizer.lr, or train in float32 to find the cause."
        )
    if config.clip_grad_norm > 0.0:
        _clip(optimizer, config.clip_grad_norm, grad_norm)
    optimizer.step_with_ready_grads()
    return grad_norm, lr


def _use_fused_kernel(inner: list[torch.optim.AdamW]) -> None:
    for optimizer in inner:
        for group in optimizer.param_groups:
            group["fused"] = True


def _clip(optimizer: MegatronOptimizer, max_norm: float, grad_norm: float) -> None:
    from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32

    for part in optimizer.chained_optimizers:
        parameters = part.get_parameters()
        if parameters:
            clip_grad_by_total_norm_fp32(parameters, max_norm=max_norm, total_norm=grad_norm)
