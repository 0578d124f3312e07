"""The trainable policy: a Megatron model in its gradient buffers, its optimizer, and what the loop asks of them.

Both passes, with and without gradient, run through Megatron's own forward-backward schedule, so that every layout it knows
takes the same way. The loss is scaled by the *global* batch's normalisers before the backward pass; gradients are then only
summed, over micro-batches and over data- and context-parallel ranks, and nothing is divided afterwards.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from skyrl_mega.algorithms.loss import LossStats, mean_stats, merge_stats, policy_objective
from skyrl_mega.algorithms.policy_losses import TOKEN_SEPARABLE, LossInputs
from skyrl_mega.algorithms.reductions import reduction_weights
from skyrl_mega.data.context_shards import context_part
from skyrl_mega.errors import ConfigError, NumericsError
from skyrl_mega.training import optimizer as optim
from skyrl_mega.training.expert_load import announce_tokens, expert_load_metrics
from skyrl_mega.training.logprobs import head_logprobs, head_loss, to_device, whole
from skyrl_mega.training.parking import ParkedState
from skyrl_mega.types import Metrics, MicroBatch, TrainBatch
from skyrl_mega_kernels.backends import backends_that_ran

if TYPE_CHECKING:
    from skyrl_mega.config.schema import AlgorithmConfig, Config
    from skyrl_mega.models.build import PolicyModel
    from skyrl_mega.parallel.topology import Topology


#: Tokens of a rank's matrix products come in multiples of this, by recipe of `model.fp8`.
FP8_TOKENS = {"delayed": 16, "tensorwise": 16, "blockwise": 16, "mxfp8": 32}


class Policy:
    """Implements `protocols.PolicyLike`; every method is called by all ranks.

    `num_updates` counts optimizer updates so far (it drives the learning-rate schedule).
    """

    def __init__(self, config: Config, topology: Topology, chunks: list[PolicyModel]) -> None:
        from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
        from megatron.core.distributed import finalize_model_grads as finalize

        from skyrl_mega.models.hf_io import HFExporter

        self.config = config
        self.topology = topology
        self.chunks = chunks
        self.num_updates = 0
        self._fuses_loss = fuses_loss(config)
        self._exporter = HFExporter(chunks, config.model.path, topology)
        parallel = config.parallel
        ddp_config = DistributedDataParallelConfig(
            grad_reduce_in_fp32=True,
            use_distributed_optimizer=parallel.distributed_optimizer,
            overlap_grad_reduce=parallel.overlap_grad_reduce,
            overlap_param_gather=parallel.overlap_param_gather,
        )
        # Gradients of the later chunks of a stage need no small buckets: only the first chunk's backward ends last.
        self.ddps = [
            DistributedDataParallel(chunk.config, ddp_config, chunk, disable_bucketing=number > 0)
            for number, chunk in enumerate(chunks)
        ]
        for ddp in self.ddps:
            ddp.broadcast_params()
        self.optimizer = optim.build_optimizer(
            config.optimizer,
            self.ddps,
            dtype=getattr(torch, config.model.dtype),
            distributed=parallel.distributed_optimizer,
            overlap_param_gather=parallel.overlap_param_gather,
        )
        self._gather_is_pending = False
        weights = [weight for chunk in chunks for weight in chunk.parameters()]
        self._parked = ParkedState(self.optimizer, weights) if config.optimizer.offload else None
        # The loss is already normalised by the global batch, so finalising must not divide by a token count.
        chunks[0].config.finalize_model_grads_func = lambda chunks, _num_tokens, **groups: finalize(chunks, None, **groups)
        if parallel.overlap_grad_reduce:
            # Reductions start in the last micro-batch's backward; the schedules hold them back before it.
            chunks[0].config.no_sync_func = [ddp.no_sync for ddp in self.ddps] if len(chunks) > 1 else self.ddps[0].no_sync

    @classmethod
    def from_hf(cls, config: Config, topology: Topology) -> Policy:
        """The policy with the weights of `config.model.path`."""
        from skyrl_mega.models.build import build_model
        from skyrl_mega.models.hf_io import load_hf_weights

        chunks = build_model(config, topology)
        load_hf_weights(chunks, config.model.path, topology)
        return cls(config, topology, chunks)

    @property
    def implementation(self) -> dict[str, str]:
        """Which layers and which attention run; see PolicyModel."""
        return self.chunks[0].implementation

    # -- passes ---------------------------------------------------------------------------------------------------------

    def compute_logprobs(self, batch: TrainBatch, *, temperature: float | None = None) -> list[torch.Tensor]:
        """Log-probabilities of the labels under the current weights: one float32 [T] on CPU per micro-batch.

        Those that the rollout's sampler draws from (its temperature, top-k and top-p), or of the whole vocabulary at the
        `temperature` given; 0 where loss_mask is False.
        """
        self._complete_weights()
        return forward_logprobs(self.chunks, batch, self.config, self.topology, temperature=temperature)

    def train_step(self, batch: TrainBatch) -> Metrics:
        """One optimizer update over all micro-batches; returns numbers reduced over the global batch.

        A batch in which every advantage is zero changes nothing: no update is made and `update/skipped` is 1.
        Raises NumericsError, with the weights untouched, if the loss or the gradient norm is not finite.
        """
        if not batch.micro_batches:
            return {"update/skipped": 1.0, "update/samples_skipped": float(batch.num_skipped)}
        for ddp in self.ddps:
            ddp.zero_grad_buffer()
        self.optimizer.zero_grad()
        parts = (_my_part(micro_batch, self.config, self.topology) for micro_batch in batch.micro_batches)
        announce_tokens(self.chunks, parts, self.topology)
        with self.topology.deadline("train"):
            outputs = run_schedule(self.ddps, batch.micro_batches, partial(self._forward_step, batch), forward_only=False)
        metrics = self.topology.from_last_stage(self._reduce(outputs) if outputs else None, phase="loss")
        if not math.isfinite(metrics["loss/total"]):
            parts = {name: value for name, value in metrics.items() if name.startswith("loss/")}
            raise NumericsError(f"the loss of update {self.num_updates} is not finite; the step was not applied: {parts}")
        metrics |= expert_load_metrics(self.chunks, self.topology)
        if self._parked is not None:
            self._parked.fetch()
        with self.topology.deadline("update"):
            grad_norm, lr = optim.step(self.optimizer, self.config.optimizer, self.num_updates)
        self._gather_is_pending = self.config.parallel.overlap_param_gather
        self.park_optimizer()
        self.num_updates += 1
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

    def _forward_step(self, batch: TrainBatch, micro_batches: Iterator[MicroBatch], model: torch.nn.Module) -> tuple:
        from skyrl_mega.models.build import forward_hidden

        self.topology.progress()
        micro_batch = _my_part(next(micro_batches), self.config, self.topology)
        return forward_hidden(model, micro_batch), partial(self._loss, batch, micro_batch)

    def _complete_weights(self) -> None:
        """Gathers the weights of the last update, where that was left to the next update's forward. *All ranks.*"""
        if self._gather_is_pending:
            for ddp in self.ddps:
                ddp.start_param_sync(force_sync=True)
            self._gather_is_pending = False

    def _loss(self, batch: TrainBatch, micro_batch: MicroBatch, hidden_TH: torch.Tensor) -> tuple:
        """(objective, token count, statistics): the triple that Megatron's schedule expects of a loss function."""
        self._gather_head()
        weights_T = reduction_weights(
            self.config.algorithm.reduction,
            micro_batch.loss_mask,
            micro_batch.cu_seqlens,
            micro_batch.loss_tokens_per_sequence,
            batch.num_loss_tokens,
            batch.num_sequences,
        )
        place = (hidden_TH, self.chunks[-1], micro_batch, self.config, self.topology)
        objective = partial(_objective, self.config.algorithm, micro_batch, weights_T)
        if self._fuses_loss:
            loss, chunks = head_loss(*place, objective)
            stats = merge_stats(chunks)
        else:
            head = head_logprobs(*place, return_entropy=True)
            every_token = torch.arange(micro_batch.num_tokens, device=hidden_TH.device)
            loss, stats = objective(every_token, head.logprobs, head.entropy)
        if self.config.parallel.overlap_grad_reduce:
            loss.register_hook(self._announce_head_gradient)
        return loss, torch.zeros([], dtype=torch.int, device=hidden_TH.device), stats

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
        if not (head.pre_process and head.share_embeddings_and_output_weights):
            weight = output_weight(head)
            weight.grad_added_to_main_grad = True
            weight.grad = weight.new_zeros(()).expand_as(weight)

    def _reduce(self, outputs: Sequence[LossStats]) -> Metrics:
        """The statistics of all micro-batches of all data- and context-parallel ranks, and which kernels ran. Last stage only."""
        sums = {name: sum(float(out.sums[name]) for out in outputs) for name in outputs[0].sums}
        maxima = {name: max(float(out.maxima[name]) for out in outputs) for name in outputs[0].maxima}
        reduce = self.topology.all_reduce_metrics
        kernels = {f"kernels/{operator}/{backend}": 1.0 for operator, ran in backends_that_ran().items() for backend in ran}
        return mean_stats(reduce(sums, op="sum")) | reduce(maxima, op="max") | kernels

    def park_optimizer(self) -> None:
        """Moves the optimizer's state to host memory again, where `optimizer.offload` asks for that. *All ranks.*"""
        if self._parked is not None:
            self._parked.park()

    # -- checkpoints ----------------------------------------------------------------------------------------------------

    def sharded_state(self) -> dict[str, Any]:
        """Model and optimizer as a Megatron dist checkpoint holds them: views of their memory, which loading fills.

        With `optimizer.offload` the state stays on the device until `park_optimizer`.
        """
        from skyrl_mega.models.build import sharded_state

        self._complete_weights()
        if self._parked is not None:
            self._parked.fetch()
        model_state = sharded_state(self.chunks)
        return {"model": model_state, "optimizer_state": optim.sharded_state(self.optimizer, model_state)}

    def load_state(self, state: dict[str, Any], *, num_updates: int) -> None:
        """Completes what loading into `sharded_state` began."""
        from skyrl_mega.models.build import load_state

        load_state(self.chunks, state["model"])
        optim.set_num_steps(self.optimizer, num_updates)
        self.num_updates = num_updates
        self.park_optimizer()

    # -- weights (protocols.WeightSource) -------------------------------------------------------------------------------

    def fused_groups(self) -> Sequence[tuple[str, ...]]:
        return self._exporter.fused_groups()

    def iter_weights(self, dtype: torch.dtype) -> Iterator[tuple[str, torch.Tensor]]:
        self._complete_weights()
        return self._exporter.iter_weights(dtype)

    def save_hf(self, output: str) -> None:
        """Writes the policy as a Hugging Face directory with the source's config and tokenizer files."""
        from skyrl_mega.models.hf_io import save_hf

        self._complete_weights()
        save_hf(self._exporter, self.config.model.path, output, getattr(torch, self.config.model.dtype))


def packing_multiples(config: Config, topology: Topology) -> dict[str, int]:
    """What the layout asks of `balance_and_pack`: tokens per micro-batch, and micro-batches per update, in multiples."""
    return {
        # Context-parallel ranks pad their parts themselves.
        "pad_to_multiple": _token_multiple(config, topology) if topology.cp_size == 1 else 1,
        # The interleaved schedule sends micro-batches through the stages in groups of the pipeline's size.
        "micro_batch_multiple": topology.pp_size if config.parallel.virtual_pipeline > 1 else 1,
    }


def _token_multiple(config: Config, topology: Topology) -> int:
    """The number of tokens that a rank computes at once must be a multiple of this."""
    return (topology.tp_size if config.parallel.sequence_parallel else 1) * FP8_TOKENS.get(config.model.fp8, 1)


def _my_part(micro_batch: MicroBatch, config: Config, topology: Topology) -> MicroBatch:
    """What this context-parallel rank computes of the micro-batch, on its device."""
    multiple = _token_multiple(config, topology)
    return to_device(context_part(micro_batch, topology.cp_rank, topology.cp_size, pad_to_multiple=multiple), topology.device)


def fuses_loss(config: Config) -> bool:
    """Whether LM head and loss run in one pass. Raises ConfigError where that was asked for and the loss does not allow it."""
    loss = config.algorithm.policy_loss
    if config.model.fused_loss == "on" and loss not in TOKEN_SEPARABLE:
        raise ConfigError(
            f"`model.fused_loss` is on and `algorithm.policy_loss` ({loss}) is no sum over tokens; set `model.fused_loss=auto`."
        )
    return config.model.fused_loss != "off" and loss in TOKEN_SEPARABLE


def _objective(
    config: AlgorithmConfig,
    micro_batch: MicroBatch,
    weights_T: torch.Tensor,
    index_C: torch.Tensor,
    logprobs_C: torch.Tensor,
    entropy_C: torch.Tensor | None,
) -> tuple[torch.Tensor, LossStats]:
    """The objective of the micro-batch's tokens `index_C` (int64 [C]) from their current logprobs and entropies."""

    def at(values_T: torch.Tensor | None) -> torch.Tensor | None:
        return None if values_T is None else values_T[index_C]

    old_logprobs_C = at(micro_batch.old_logprobs)
    inputs = LossInputs(
        logprobs=logprobs_C,
        # One update per batch: the policy before the update is the policy now.
        old_logprobs=logprobs_C.detach() if old_logprobs_C is None else old_logprobs_C,
        advantages=micro_batch.advantages[index_C],
        loss_mask=micro_batch.loss_mask[index_C],
        entropy=entropy_C,
        ref_logprobs=at(micro_batch.ref_logprobs),
        rollout_logprobs=micro_batch.rollout_logprobs[index_C],
    )
    return policy_objective(config, inputs, weights_T[index_C])


def run_schedule(
    chunks: Sequence[torch.nn.Module], micro_batches: Sequence[MicroBatch], forward_step: Any, *, forward_only: bool
) -> list:
    """Megatron's forward-backward schedule over the micro-batches; returns the loss functions' third results.

    `chunks` are this rank's, wrapped or not; with several of them it is the interleaved schedule, arXiv:2104.04473.

    Only the last pipeline stage has a loss: the list is empty on the others.
    """
    from megatron.core.pipeline_parallel import get_forward_backward_func

    return get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=[iter(micro_batches) for _ in chunks],
        model=list(chunks),
        num_microbatches=len(micro_batches),
        seq_length=max(mb.num_tokens for mb in micro_batches),
        micro_batch_size=1,
        forward_only=forward_only,
    )


def forward_logprobs(
    chunks: Sequence[PolicyModel], batch: TrainBatch, config: Config, topology: Topology, *, temperature: float | None = None
) -> list[torch.Tensor]:
    """Log-probabilities of the labels without gradient: one float32 [T] on CPU per micro-batch. All ranks call.

    Every context-parallel rank gets all T of them.
    """
    from skyrl_mega.models.build import forward_hidden

    if not batch.micro_batches:
        return []

    def forward_step(micro_batches: Iterator[MicroBatch], module: torch.nn.Module) -> tuple:
        topology.progress()
        micro_batch = _my_part(next(micro_batches), config, topology)

        def collect(hidden_TH: torch.Tensor) -> tuple:
            head = head_logprobs(hidden_TH, chunks[-1], micro_batch, config, topology, temperature=temperature)
            logprobs = whole(head.logprobs, micro_batch, topology)
            return hidden_TH, torch.zeros([], dtype=torch.int, device=hidden_TH.device), logprobs.cpu()

        return forward_hidden(module, micro_batch), collect

    with torch.no_grad(), topology.deadline("logprobs"):
        logprobs = run_schedule(chunks, batch.micro_batches, forward_step, forward_only=True)
    return topology.from_last_stage(logprobs, phase="logprobs")
