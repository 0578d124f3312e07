"""The critic: a value function of the policy's kind of model, its optimizer, and what the loop asks of it.

Everything that does not depend on the loss is in `trainable`. It may have a layout of its own over the policy's ranks
(`critic.parallel`): its batches are then packed for that, and Megatron-Core's globals are those of its layout while it works.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

import torch

from skyrl_mega.algorithms.value_losses import ValueLossInputs, critic_metrics, value_objective
from skyrl_mega.config.critic import critic_config
from skyrl_mega.config.learning_rate import critic_updates
from skyrl_mega.errors import DataError, NonFiniteUpdateError
from skyrl_mega.training.expert_load import expert_load_metrics
from skyrl_mega.training.schedule import forward_per_token
from skyrl_mega.training.trainable import Trainable, in_its_layout
from skyrl_mega.types import Metrics, MicroBatch, TrainBatch

if TYPE_CHECKING:
    from skyrl_mega.config.schema import Config
    from skyrl_mega.parallel.topology import Topology


class Critic(Trainable):
    """The value of every state of a batch, and updates towards its returns. All ranks call.

    `config` is `critic_config` of the run's, `topology` a rank's place in its layout.
    """

    checkpoint_prefix = "critic."
    setting = "critic.optimizer"

    @classmethod
    def from_hf(cls, config: Config, topology: Topology) -> Critic:
        """The critic with the weights of `critic.path`, or the policy's where that is empty.

        `config` and `topology` are the run's. Where the directory has no `score.weight` every value is 0 at first.
        """
        from skyrl_mega.models.build import build_model
        from skyrl_mega.models.hf_io import load_hf_weights
        from skyrl_mega.models.value import ValueModel

        own = critic_config(config)
        if own.parallel != config.parallel:
            topology = topology.lay_out(own.parallel, seed=config.trainer.seed)
        with topology.in_force():
            chunks = build_model(own, topology, ValueModel)
            load_hf_weights(chunks, own.model.path, topology)
            return cls(own, topology, chunks)

    def _plan_updates(self, config: Config) -> int:
        return critic_updates(config)

    @in_its_layout
    def compute_values(self, batch: TrainBatch) -> list[torch.Tensor]:
        """Values under the current weights: one float32 [T] on CPU per micro-batch, on every rank of the model.

        Entry t is the value of the state that position t has seen: the one in which labels[t] is sampled. Positions without a
        label have one too (the last of a sequence: the value after its last token).
        """
        self._complete_weights()
        return forward_per_token(self.chunks, batch, self.config, self.topology, lambda values_T, _: values_T, phase="values")

    @in_its_layout
    def train_step(self, batch: TrainBatch) -> Metrics:
        """One optimizer update over all micro-batches; returns numbers reduced over the global batch, all named `critic/...`.

        Needs the micro-batches' `returns` and, for `critic.loss=clipped`, `values`: DataError where they are missing. A batch
        without micro-batches changes nothing: `critic/skipped` is 1. Raises NonFiniteUpdateError on every rank, with weights and
        optimizer untouched, if the loss or the gradient norm is not finite.
        """
        if not batch.micro_batches:
            return {"critic/skipped": 1.0}
        self._check(batch)
        outputs = self._accumulate_gradients(batch, partial(self._loss, batch))
        metrics = self.topology.from_last_stage(self._reduce(outputs) if outputs else None, phase="critic loss")
        metrics |= {f"critic/{name}": value for name, value in expert_load_metrics(self.chunks, self.topology).items()}
        if not math.isfinite(metrics["critic/loss"]):
            raise NonFiniteUpdateError(
                f"the loss of the critic's update {self.num_updates} is not finite; the step was not applied: {metrics}"
            )
        grad_norm, lr = self._apply_gradients()
        return metrics | {"critic/grad_norm": grad_norm, "critic/lr": lr}

    def _check(self, batch: TrainBatch) -> None:
        """Here and not in the loss, which only the last stage computes: all ranks must fail together."""
        needed = ("returns", "values") if self.config.critic.loss == "clipped" else ("returns",)
        for name in needed:
            if any(getattr(micro_batch, name) is None for micro_batch in batch.micro_batches):
                raise DataError(
                    f"critic.loss={self.config.critic.loss} needs {' and '.join(needed)} of every micro-batch, and one has no "
                    f"{name}: choose an `algorithm.advantage` that computes them (gae)."
                )

    def _loss(self, batch: TrainBatch, micro_batch: MicroBatch, values_T: torch.Tensor) -> tuple:
        """(objective, token count, statistics): the triple that Megatron's schedule expects of a loss function."""
        inputs = ValueLossInputs(values_T, micro_batch.returns, micro_batch.loss_mask, micro_batch.values)
        loss, sums = value_objective(self.config.critic, inputs, self._token_weights(batch, micro_batch))
        return loss, torch.zeros([], dtype=torch.int, device=values_T.device), sums

    def _reduce(self, outputs: Sequence[dict[str, torch.Tensor]]) -> Metrics:
        """The statistics of all micro-batches of all data- and context-parallel ranks. Last stage only."""
        sums = {name: sum(float(output[name]) for output in outputs) for name in outputs[0]}
        return critic_metrics(self.topology.all_reduce_metrics(sums, op="sum"))
