"""The trainable policy: what the loop asks of it, and its loss.

Both passes, with and without gradient, run through Megatron's own forward-backward schedule, so that every layout it knows
takes the same way. Everything that does not depend on the loss is in `trainable`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import TYPE_CHECKING

import torch

from skyrl_mega.algorithms.advantages import needs
from skyrl_mega.algorithms.loss import LossStats, Objective, mean_stats, merge_stats
from skyrl_mega.algorithms.policy_losses import LossInputs
from skyrl_mega.algorithms.sequences import Sequences
from skyrl_mega.config.learning_rate import policy_updates
from skyrl_mega.errors import ConfigError, NonFiniteUpdateError
from skyrl_mega.training.expert_load import expert_load_metrics
from skyrl_mega.training.logprobs import head_logprobs, head_logprobs_at, head_loss
from skyrl_mega.training.routing import recorded_routing
from skyrl_mega.training.schedule import forward_per_token
from skyrl_mega.training.trainable import Trainable
from skyrl_mega.types import Metrics, MicroBatch, TrainBatch
from skyrl_mega_kernels.backends import backends_that_ran

if TYPE_CHECKING:
    from skyrl_mega.config.schema import Config
    from skyrl_mega.models.build import PolicyModel
    from skyrl_mega.parallel.topology import Topology


class Policy(Trainable):
    """Implements `protocols.PolicyLike`; every method is called by all ranks."""

    def __init__(self, config: Config, topology: Topology, chunks: list[PolicyModel], *, adapter: str | None = None) -> None:
        #: Where an adaptive coefficient of the KL term stands; None: `algorithm.kl.coef`.
        self.kl_coef: float | None = None
        self._objective = Objective(config.algorithm, config.model.kernels)
        self._fuses_loss = fuses_loss(config, self._objective)
        super().__init__(config, topology, chunks, adapter=adapter)

    @classmethod
    def from_hf(cls, config: Config, topology: Topology) -> Policy:
        """The policy with the weights of `config.model.path`, and beside them an adapter if the `lora` section asks for one."""
        from skyrl_mega.models.build import build_model
        from skyrl_mega.models.hf_io import load_hf_weights

        chunks = build_model(config, topology)
        load_hf_weights(chunks, config.model.path, topology)
        if config.lora.rank == 0:
            return cls(config, topology, chunks)
        from skyrl_mega.models.lora import DEFAULT, Adapters

        Adapters(chunks, config.model.path, topology)
        return cls._with_adapter(config, topology, chunks, DEFAULT)

    @classmethod
    def _with_adapter(cls, config: Config, topology: Topology, chunks: list[PolicyModel], name: str) -> Policy:
        from skyrl_mega.models.lora_weights import load_adapter

        adapters = chunks[0].adapters
        adapters.add(name, config.lora, seed=config.trainer.seed)
        if config.lora.path:
            load_adapter(adapters, name, config.lora.path)
        return cls(config, topology, chunks, adapter=name)

    def beside(self, name: str, config: Config) -> Policy:
        """A policy that trains another adapter of the same model, with an optimizer of its own. *All ranks.*

        `config`: its `lora`, `optimizer` and `algorithm` sections; layout and model are this policy's. Raises ConfigError where
        this policy trains the whole model, or has an adapter of that name.
        """
        if self.chunks[0].adapters is None:
            raise ConfigError("a second policy on the same model needs `lora.rank` > 0: this one trains the model's own weights.")
        return self._with_adapter(config, self.topology, self.chunks, name)

    @property
    def vocab_size(self) -> int:
        """How many tokens the policy knows."""
        return self.chunks[0].vocab_size

    @contextmanager
    def trained_by(self, config: Config) -> Iterator[None]:
        """Inside the block updates are made by the algorithm, sampler and optimizer settings of `config`: a warm-up's, say.

        Model, layout and AdamW's state stay what they are. Raises ConfigError as the constructor does.
        """
        own = self.config, self._objective, self._fuses_loss
        objective = Objective(config.algorithm, config.model.kernels)
        self.config, self._objective, self._fuses_loss = config, objective, fuses_loss(config, objective)
        try:
            yield
        finally:
            self.config, self._objective, self._fuses_loss = own

    def _plan_updates(self, config: Config) -> int:
        return policy_updates(config, has_critic="values" in needs(config.algorithm))

    # -- passes ---------------------------------------------------------------------------------------------------------

    def compute_logprobs(self, batch: TrainBatch, *, temperature: float | None = None) -> list[torch.Tensor]:
        """Log-probabilities of the labels under the current weights: one float32 [T] on CPU per micro-batch.

        Those that the rollout's sampler draws from (its temperature, top-k and top-p), or of the whole vocabulary at the
        `temperature` given; 0 where loss_mask is False.
        """
        self._complete_weights()
        with self.weights.on():
            return forward_logprobs(self.chunks, batch, self.config, self.topology, temperature=temperature)

    def fill_old_logprobs(self, batch: TrainBatch) -> None:
        """Gives every micro-batch its old_logprobs under the current weights; with router_replay=old also its routed_experts."""
        records = self.config.model.router_replay == "old"
        with recorded_routing(self.chunks, batch, self.config, self.topology) if records else nullcontext():
            logprobs = self.compute_logprobs(batch)
        for micro_batch, old_logprobs in zip(batch.micro_batches, logprobs, strict=True):
            micro_batch.old_logprobs = old_logprobs

    def train_step(self, batch: TrainBatch) -> Metrics:
        """One optimizer update over all micro-batches; returns numbers reduced over the global batch.

        A batch in which every advantage is zero changes nothing: no update is made and `update/skipped` is 1.
        Raises NonFiniteUpdateError on every rank, with weights and optimizer untouched, if the loss or the gradient norm is not
        finite.
        """
        if not batch.micro_batches:
            return {"update/skipped": 1.0, "update/samples_skipped": float(batch.num_skipped)}
        outputs = self._accumulate_gradients(batch, partial(self._loss, batch))
        metrics = self.topology.from_last_stage(self._reduce(outputs) if outputs else None, phase="loss")
        metrics |= expert_load_metrics(self.chunks, self.topology)  # which also empties the routers' counts
        if not math.isfinite(metrics["loss/total"]):
            parts = {name: value for name, value in metrics.items() if name.startswith("loss/")}
            raise NonFiniteUpdateError(f"the loss of update {self.num_updates} is not finite; the step was not applied: {parts}")
        grad_norm, lr = self._apply_gradients()
        metrics |= {
            "update/grad_norm": grad_norm,
            "update/lr": lr,
            "update/skipped": 0.0,
            "update/samples_skipped": float(batch.num_skipped),
            "packing/padding_fraction": batch.padding_fraction,
            "packing/imbalance": batch.imbalance,
            "packing/micro_batches": float(len(batch.micro_batches)),
        }
        return metrics

    def _loss(self, batch: TrainBatch, micro_batch: MicroBatch, hidden_TH: torch.Tensor) -> tuple:
        """(objective, token count, statistics): the triple that Megatron's schedule expects of a loss function."""
        self._gather_head()
        place = (hidden_TH, self.chunks[-1], micro_batch, self.config, self.topology)
        weights_T = self._token_weights(batch, micro_batch)
        sequences = sequences_of(micro_batch, self.topology)
        every_token = torch.arange(micro_batch.num_tokens, device=hidden_TH.device)
        if self._fuses_loss:
            logprobs_T = hidden_TH.new_zeros(micro_batch.num_tokens, dtype=torch.float32)

            def objective(
                index_C: torch.Tensor, logprobs_C: torch.Tensor, entropy_C: torch.Tensor | None
            ) -> tuple[torch.Tensor, LossStats]:
                logprobs_T[index_C] = logprobs_C.detach()
                inputs = self._inputs_of(micro_batch, index_C, logprobs_C, entropy_C)
                return self._objective(inputs, weights_T[index_C], kl_coef=self.kl_coef)

            loss, chunks = head_loss(*place, objective)
            stats = merge_stats(chunks)
            stats.sums.update(
                self._objective.sequence_sums(self._inputs_of(micro_batch, every_token, logprobs_T, sequences=sequences))
            )
        else:
            head = head_logprobs(*place, return_entropy=True)
            topk_logprobs = None
            if "teacher_topk" in self._objective.needs:
                topk_logprobs = head_logprobs_at(*place, _teacher_topk_ids(micro_batch, self.config.algorithm.policy_loss))
            inputs = self._inputs_of(
                micro_batch, every_token, head.logprobs, head.entropy, sequences=sequences, topk_logprobs=topk_logprobs
            )
            loss, stats = self._objective(inputs, weights_T, kl_coef=self.kl_coef)
        if self.config.parallel.overlap_grad_reduce:
            loss.register_hook(self._announce_head_gradient)
        return loss, torch.zeros([], dtype=torch.int, device=hidden_TH.device), stats

    def _inputs_of(
        self,
        micro_batch: MicroBatch,
        index_C: torch.Tensor,
        logprobs_C: torch.Tensor,
        entropy_C: torch.Tensor | None = None,
        *,
        sequences: Sequences | None = None,
        topk_logprobs: torch.Tensor | None = None,
    ) -> LossInputs:
        """What the objective looks at of the micro-batch's tokens `index_C` (int64 [C]), with their current logprobs.

        `sequences` and `topk_logprobs` are there only where C is all tokens.
        """

        def at(values_T: torch.Tensor | None) -> torch.Tensor | None:
            return None if values_T is None else values_T[index_C]

        rollout_logprobs_C = micro_batch.rollout_logprobs[index_C]
        old_logprobs_C = rollout_logprobs_C if self.config.algorithm.old_logprobs == "rollout" else at(micro_batch.old_logprobs)
        return LossInputs(
            logprobs=logprobs_C,
            # One update per batch: the policy before the update is the policy now.
            old_logprobs=logprobs_C.detach() if old_logprobs_C is None else old_logprobs_C,
            advantages=micro_batch.advantages[index_C],
            loss_mask=micro_batch.loss_mask[index_C],
            entropy=entropy_C,
            ref_logprobs=at(micro_batch.ref_logprobs),
            rollout_logprobs=rollout_logprobs_C,
            sequences=sequences,
            marked=at(None if micro_batch.marked is None else micro_batch.marked > 0),
            staleness=at(micro_batch.staleness),
            topk_logprobs=topk_logprobs,
            teacher_topk_logprobs=micro_batch.teacher_topk_logprobs if topk_logprobs is not None else None,
        )

    def _gather_head(self) -> None:
        """Waits for the head's updated weight. For weights that a module's forward uses, hooks of Megatron's do this."""
        if self.config.parallel.overlap_param_gather:
            from skyrl_mega.models.build import output_weight

            self.ddps[-1].param_to_bucket_group[output_weight(self.chunks[-1])].finish_param_sync()

    def _announce_head_gradient(self, _: torch.Tensor) -> None:
        """Before each backward pass: what Megatron's reduction wants to see of a weight whose gradient autograd never holds.

        The head's kernels add it to `main_grad` themselves. An embedding that is the head too is announced by its own gradient.
        """
        from skyrl_mega.models.build import output_weight

        head = self.chunks[-1]
        weight = output_weight(head)
        if weight.requires_grad and not (head.pre_process and head.share_embeddings_and_output_weights):
            weight.grad_added_to_main_grad = True
            weight.grad = weight.new_zeros(()).expand_as(weight)

    def _reduce(self, outputs: Sequence[LossStats]) -> Metrics:
        """The statistics of all micro-batches of all data- and context-parallel ranks, and which kernels ran. Last stage only."""
        sums = {name: sum(float(out.sums[name]) for out in outputs) for name in outputs[0].sums}
        maxima = {name: max(float(out.maxima[name]) for out in outputs) for name in outputs[0].maxima}
        reduce = self.topology.all_reduce_metrics
        kernels = {f"kernels/{operator}/{backend}": 1.0 for operator, ran in backends_that_ran().items() for backend in ran}
        return mean_stats(reduce(sums, op="sum")) | reduce(maxima, op="max") | kernels


def fuses_loss(config: Config, objective: Objective) -> bool:
    """Whether LM head and loss run in one pass. Raises ConfigError where that was asked for and the loss does not allow it."""
    if config.model.fused_loss == "on" and not objective.token_separable:
        raise ConfigError(
            f"`model.fused_loss` is on and `algorithm.policy_loss` ({config.algorithm.policy_loss}), or a stage of"
            " `algorithm.off_policy`, is no sum over tokens; set `model.fused_loss=auto`."
        )
    return config.model.fused_loss != "off" and objective.token_separable


def _teacher_topk_ids(micro_batch: MicroBatch, policy_loss: str) -> torch.Tensor:
    if micro_batch.teacher_topk_ids is None:
        raise ConfigError(
            f"`algorithm.policy_loss` ({policy_loss}) needs the teacher's likeliest tokens with every batch: set `teacher.path`"
            " and `teacher.topk`, and call `fill_teacher_topk` before the update."
        )
    return micro_batch.teacher_topk_ids


def sequences_of(micro_batch: MicroBatch, topology: Topology) -> Sequences:
    """The sequences of a micro-batch, or of a context-parallel rank's part of one, for sums over whole ones."""
    part = micro_batch.context
    if part is None:
        return Sequences.packed(micro_batch.cu_seqlens)
    lengths_P = micro_batch.cu_seqlens.diff().long()
    index_T = part.sequence.to(lengths_P.device).repeat_interleave(lengths_P)
    return Sequences(index_T, part.num_sequences, topology.sum_over_context)


def forward_logprobs(
    chunks: Sequence[PolicyModel], batch: TrainBatch, config: Config, topology: Topology, *, temperature: float | None = None
) -> list[torch.Tensor]:
    """Log-probabilities of the labels without gradient: one float32 [T] on CPU per micro-batch. All ranks call.

    Every context-parallel rank gets all T of them.
    """

    def logprobs(hidden_TH: torch.Tensor, micro_batch: MicroBatch) -> torch.Tensor:
        return head_logprobs(hidden_TH, chunks[-1], micro_batch, config, topology, temperature=temperature).logprobs

    return forward_per_token(chunks, batch, config, topology, logprobs, phase="logprobs")
