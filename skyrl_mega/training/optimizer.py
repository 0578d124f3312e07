"""The optimizer over Megatron's gradient buffers: its construction, and one guarded step.

On CPU Megatron-Core falls back to torch's AdamW; two of its habits are mended here. Its state is filled at construction, so
that memory is at its peak before the first step and a checkpoint can be taken (and loaded) before any update. And torch's
fused CPU kernel is switched on: one pass over memory instead of ten.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from skyrl_mega.config.learning_rate import learning_rate
from skyrl_mega.config.schema import OptimizerConfig
from skyrl_mega.errors import ConfigError, NonFiniteUpdateError
from skyrl_mega.training.optimizer_state import sharded_tensors

if TYPE_CHECKING:
    import torch
    from megatron.core.dist_checkpointing.mapping import ShardedTensor
    from megatron.core.distributed import DistributedDataParallel
    from megatron.core.optimizer import MegatronOptimizer


def build_optimizer(
    config: OptimizerConfig,
    chunks: list[DistributedDataParallel],
    *,
    dtype: torch.dtype,
    distributed: bool,
    overlap_param_gather: bool,
) -> MegatronOptimizer:
    """Megatron's optimizer over `chunks`; every setting of `config` reaches AdamW or Muon. All ranks call.

    bfloat16 parameters get float32 masters; `distributed` shards masters and moments over the data-parallel ranks. Raises
    ConfigError for Muon with `distributed`.
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
    if config.name == "muon":
        from skyrl_mega.models.build import unwrap
        from skyrl_mega.training.muon import use_muon

        if distributed:
            raise ConfigError("Muon works on whole matrices: it needs `parallel.distributed_optimizer=false`.")
        adamw = {"lr": config.lr, "betas": (config.beta1, config.beta2), "eps": config.eps, "weight_decay": config.weight_decay}
        use_muon(optimizer, [unwrap(chunk) for chunk in chunks], adamw, config.muon)
        return optimizer
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


def sharded_state(optimizer: MegatronOptimizer, model_state: dict[str, Any]) -> list[ShardedTensor]:
    """The optimizer's part of a Megatron dist checkpoint: views of its memory, which loading fills. All ranks call."""
    for part in optimizer.chained_optimizers:
        if part.optimizer is not None and not part.optimizer.state:
            # TransformerEngine's and Apex's optimizers allocate at their first step.
            part.load_state_dict(part.state_dict())
    return sharded_tensors(optimizer, model_state)


def set_num_steps(optimizer: MegatronOptimizer, num_steps: int) -> None:
    """Sets AdamW's own count of steps, which corrects the moments' bias, once a checkpoint has filled the moments."""
    from skyrl_mega.training.muon import MuonWithAdamW

    counts_per_parameter = torch_optimizers(optimizer)
    for part in optimizer.chained_optimizers:
        if part.optimizer in counts_per_parameter or isinstance(part.optimizer, MuonWithAdamW):
            for state in part.optimizer.state.values():
                state["step"].fill_(num_steps)
        elif part.optimizer is not None:
            for group in part.optimizer.param_groups:
                group["step"] = num_steps


def step(
    optimizer: MegatronOptimizer, config: OptimizerConfig, update: int, *, planned_updates: int = 0, setting: str = "optimizer"
) -> tuple[float, float]:
    """Clips and applies the accumulated gradients; returns (gradient norm before clipping, learning rate). All ranks call.

    `planned_updates`: as in `learning_rate`. `setting` is what the configuration calls `config`. Raises NonFiniteUpdateError on
    every rank, with weights and optimizer state untouched, if the gradient norm is not finite.
    """
    lr = learning_rate(config, update, planned_updates=planned_updates)
    for group in optimizer.param_groups:
        # Megatron leaves the multiplier to its scheduler; without it norms and biases would be decayed too.
        group["lr"] = lr
        group["weight_decay"] = config.weight_decay * group["wd_mult"]
    overflow = optimizer.prepare_grads()
    grad_norm = float(optimizer.get_grad_norm())
    if overflow or not math.isfinite(grad_norm):
        raise NonFiniteUpdateError(
            f"the gradient norm of update {update} is {grad_norm}: the step was not applied. The last checkpoint is good; "
            f"lower {setting}.lr, or train in float32 to find the cause."
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
    """Scales the gradients in place. Megatron's own function first makes a scaled copy of each where Apex is missing."""
    import torch

    factor = max_norm / (grad_norm + 1.0e-6)
    if factor < 1.0:
        parameters = [p for part in optimizer.chained_optimizers for p in part.get_parameters() if p.grad is not None]
        torch._foreach_mul_([p.grad for p in parameters], factor)
