"""What policy and critic share: a Megatron model in its gradient buffers, its optimizer, and the passes of one update.

The loss is scaled by the *global* batch's normalisers before the backward pass; gradients are then only summed, over
micro-batches and over data- and context-parallel ranks, and nothing is divided afterwards.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial, wraps
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, TypeVar

import torch

from skyrl_mega.algorithms.reductions import Totals, reduction_weights
from skyrl_mega.errors import ConfigError
from skyrl_mega.models.biased_router import move_biases
from skyrl_mega.training import optimizer as optim
from skyrl_mega.training.expert_load import announce_tokens
from skyrl_mega.training.parking import ParkedTensors, own_tensors
from skyrl_mega.training.schedule import my_part, run_schedule
from skyrl_mega.training.trained_weights import trained_weights
from skyrl_mega.types import MicroBatch, TrainBatch

if TYPE_CHECKING:
    from skyrl_mega.config.schema import Config
    from skyrl_mega.models.build import PolicyModel
    from skyrl_mega.parallel.topology import Topology
    from skyrl_mega.protocols import WeightSource


#: (the rank's part of a micro-batch, what the last stage's model gave) -> Megatron's triple: loss, token count, statistics.
MicroBatchLoss = Callable[[MicroBatch, torch.Tensor], tuple]


P, T, Self = ParamSpec("P"), TypeVar("T"), TypeVar("Self", bound="Trainable")


def in_its_layout(method: Callable[Concatenate[Self, P], T]) -> Callable[Concatenate[Self, P], T]:
    """The method with Megatron-Core's globals being those of the model's own layout while it runs."""

    @wraps(method)
    def in_force(self: Self, *args: P.args, **kwargs: P.kwargs) -> T:
        with self.topology.in_force():
            return method(self, *args, **kwargs)

    return in_force


class Trainable:
    """A model that is trained. Every method is called by all ranks.

    `config.model.path` is the directory its weights came from, `config.optimizer` the optimizer's settings; `setting` is what
    errors call the latter. `num_updates` counts optimizer updates so far (it drives the learning-rate schedule).
    """

    #: Put before the names of the tensors in a checkpoint.
    checkpoint_prefix = ""
    setting = "optimizer"

    def __init__(self, config: Config, topology: Topology, chunks: list[PolicyModel], *, adapter: str | None = None) -> None:
        """`adapter`: the name of the adapter that is trained, of those beside the model; None: the whole model."""
        from megatron.core.distributed import finalize_model_grads as finalize

        self.config = config
        self.topology = topology
        self.chunks = chunks
        self.num_updates = 0
        self._planned_updates = self._plan_updates(config)
        self.weights = trained_weights(chunks, topology, adapter)
        with self.weights.on():
            self._make_buffers()
        self._gather_is_pending = False
        weights = [weight for chunk in chunks for weight in chunk.parameters()]
        self._parked = ParkedTensors(own_tensors(self.optimizer, weights)) if config.optimizer.offload else None
        # The loss is already normalised by the global batch, so finalising must not divide by a token count.
        chunks[0].config.finalize_model_grads_func = lambda chunks, _num_tokens, **groups: finalize(chunks, None, **groups)

    def _make_buffers(self) -> None:
        """Gradient buffers and optimizer of the parameters that want a gradient now."""
        from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig

        config, chunks = self.config, self.chunks
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

    @property
    def implementation(self) -> dict[str, str]:
        """Which layers and which attention run; see PolicyModel."""
        return self.chunks[0].implementation

    # -- one update -----------------------------------------------------------------------------------------------------

    def _accumulate_gradients(self, batch: TrainBatch, loss: MicroBatchLoss) -> list:
        """Fresh gradients of all micro-batches; the losses' statistics, on the last pipeline stage (else [])."""
        for ddp in self.ddps:
            ddp.zero_grad_buffer()
        self.optimizer.zero_grad()
        parts = (my_part(micro_batch, self.config, self.topology) for micro_batch in batch.micro_batches)
        announce_tokens(self.chunks, parts, self.topology)
        if self.config.parallel.overlap_grad_reduce:
            # Reductions start in the last micro-batch's backward; the schedules hold them back before it.
            held_back = [ddp.no_sync for ddp in self.ddps]
            self.chunks[0].config.no_sync_func = held_back if len(held_back) > 1 else held_back[0]
        with self.weights.on(), self.topology.deadline("train"):
            return run_schedule(self.ddps, batch.micro_batches, partial(self._forward_step, loss), forward_only=False)

    def _forward_step(self, loss: MicroBatchLoss, micro_batches: Iterator[MicroBatch], model: torch.nn.Module) -> tuple:
        from skyrl_mega.models.build import forward_hidden

        self.topology.progress()
        micro_batch = my_part(next(micro_batches), self.config, self.topology)
        return forward_hidden(model, micro_batch), partial(loss, micro_batch)

    def _token_weights(self, batch: TrainBatch, micro_batch: MicroBatch) -> torch.Tensor:
        """What each token of a part of a micro-batch weighs in the loss of the global batch, float32 [T]."""
        algorithm = self.config.algorithm
        length = algorithm.reduction_length or self.config.rollout.max_new_tokens
        return reduction_weights(
            algorithm.reduction,
            micro_batch.loss_mask,
            micro_batch.cu_seqlens,
            micro_batch.loss_tokens_per_sequence,
            micro_batch.loss_tokens_per_group,
            Totals(batch.num_loss_tokens, batch.num_sequences, batch.num_groups, length),
        )

    def _apply_gradients(self) -> tuple[float, float]:
        """(gradient norm before clipping, learning rate) of the update made.

        Raises NonFiniteUpdateError, with the weights untouched, if the norm is not finite.
        """
        if self._parked is not None:
            self._parked.fetch()
        try:
            with self.topology.deadline("update"):
                grad_norm, lr = optim.step(
                    self.optimizer,
                    self.config.optimizer,
                    self.num_updates,
                    planned_updates=self._planned_updates,
                    setting=self.setting,
                )
        finally:
            self.park_optimizer()
        move_biases(self.chunks, self.config.model.moe_bias_update_rate)
        self._gather_is_pending = self.config.parallel.overlap_param_gather
        self.num_updates += 1
        return grad_norm, lr

    def _plan_updates(self, config: Config) -> int:
        """How many updates the run of `config` plans: the length of a learning-rate schedule that is given none."""
        raise NotImplementedError

    def _complete_weights(self) -> None:
        """Gathers the weights of the last update, where that was left to the next update's forward. *All ranks.*"""
        if self._gather_is_pending:
            for ddp in self.ddps:
                ddp.start_param_sync(force_sync=True)
            self._gather_is_pending = False

    def park_optimizer(self) -> None:
        """Moves the optimizer's state to host memory again, where its `offload` asks for that. *All ranks.*"""
        if self._parked is not None:
            self._parked.park()

    # -- checkpoints ----------------------------------------------------------------------------------------------------

    @in_its_layout
    def sharded_state(self) -> dict[str, Any]:
        """Model and optimizer as a Megatron dist checkpoint holds them: views of their memory, which loading fills.

        With `offload` the optimizer's state stays on the device until `park_optimizer`.
        """
        self._complete_weights()
        if self._parked is not None:
            self._parked.fetch()
        model_state = self.weights.sharded_state(self.checkpoint_prefix)
        return {"model": model_state, "optimizer_state": optim.sharded_state(self.optimizer, model_state)}

    @in_its_layout
    def load_state(self, state: dict[str, Any], *, num_updates: int) -> None:
        """Completes what loading into `sharded_state` began."""
        self.weights.load_state(state["model"], self.checkpoint_prefix)
        optim.set_num_steps(self.optimizer, num_updates)
        self.num_updates = num_updates
        self.park_optimizer()

    # -- weights (protocols.WeightSource: the whole model) ----------------------------------------------------------------

    @property
    def adapter_source(self) -> WeightSource:
        """The adapter that is trained alone, for engines that have its base. Raises ConfigError where the whole model is."""
        if self.weights.adapter is None:
            raise ConfigError("there is no adapter to publish: `lora.rank` is 0, the whole model is trained.")
        from skyrl_mega.models.lora_weights import AdapterSource

        self._complete_weights()
        return AdapterSource(self.weights.adapter)

    def fused_groups(self) -> Sequence[tuple[str, ...]]:
        return self.weights.exporter.fused_groups()

    def iter_weights(self, dtype: torch.dtype) -> Iterator[tuple[str, torch.Tensor]]:
        self._complete_weights()
        return self.weights.exporter.iter_weights(dtype)

    @in_its_layout
    def save_hf(self, output: str) -> None:
        """Writes the model as a Hugging Face directory with the source's config and tokenizer files; adapters are merged."""
        from skyrl_mega.models.hf_io import save_hf

        self._complete_weights()
        save_hf(self.weights.exporter, self.config.model.path, output, getattr(torch, self.config.model.dtype))

    @in_its_layout
    def save_adapter(self, output: str) -> None:
        """Writes the adapter that is trained as a PEFT directory. ConfigError where the whole model is trained."""
        if self.weights.adapter is None:
            raise ConfigError("there is no adapter to write: `lora.rank` is 0, the whole model is trained.")
        from skyrl_mega.models.lora_weights import save_adapter

        self._complete_weights()
        save_adapter(self.weights.adapter, self.config.model.path, output)

    @in_its_layout
    def save_apart(self, output: str) -> None:
        """As `save_hf`, but an adapter that is trained goes to a directory `lora` inside, and the base is not changed by it."""
        from skyrl_mega.models.hf_io import save_hf

        self._complete_weights()
        save_hf(self.weights.base_exporter, self.config.model.path, output, getattr(torch, self.config.model.dtype))
        if self.weights.adapter is not None:
            self.save_adapter(f"{output}/lora")
