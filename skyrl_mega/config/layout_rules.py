"""Which layouts fit a model and a number of processes. Reads no file. The critic's layout is held to the same rules."""

from __future__ import annotations

from collections.abc import Iterator

from skyrl_mega.config.rule import Facts, Finding, RuleBook
from skyrl_mega.config.schema import Config

LAYOUT_COMBINATIONS = RuleBook()
rule = LAYOUT_COMBINATIONS.rule


def data_parallel_size(config: Config, world_size: int) -> int:
    """How many copies of the model train: world size / (tensor x pipeline x context), rounded down."""
    return world_size // _model_size(config)


def _model_size(config: Config) -> int:
    """Processes that share one copy of the model; at least 1, since a size below 1 is reported by its own range."""
    return max(1, config.parallel.tensor * config.parallel.pipeline * config.parallel.context)


@rule("`parallel.pipeline` x `parallel.virtual_pipeline` must divide the model's number of layers")
def _pipeline_divides_layers(config: Config, facts: Facts) -> Iterator[Finding]:
    model, stages, virtual = facts.model, config.parallel.pipeline, config.parallel.virtual_pipeline
    if model is not None and stages >= 1 and virtual >= 1 and model.num_layers % (stages * virtual):
        fitting = [n for n in range(1, model.num_layers + 1) if model.num_layers % n == 0]
        yield Finding(
            f"they are {stages} and {virtual}, and the model has {model.num_layers} layers",
            f"Products that fit this model: {', '.join(map(str, fitting))}.",
        )


@rule("`parallel.virtual_pipeline` needs `parallel.pipeline` > 1: it interleaves the stages of a pipeline")
def _virtual_pipeline_needs_pipeline(config: Config, facts: Facts) -> Iterator[Finding]:
    if config.parallel.virtual_pipeline > 1 and config.parallel.pipeline == 1:
        yield Finding(
            f"`parallel.virtual_pipeline` is {config.parallel.virtual_pipeline} and `parallel.pipeline` is 1",
            "Set `parallel.virtual_pipeline=1`, or choose `parallel=pp2_vpp2`.",
        )


@rule("The number of processes must be divisible by `parallel.tensor` x `parallel.pipeline` x `parallel.context`")
def _world_size_divides(config: Config, facts: Facts) -> Iterator[Finding]:
    tensor, pipeline, context = config.parallel.tensor, config.parallel.pipeline, config.parallel.context
    model_size = _model_size(config)
    if facts.world_size % model_size:
        yield Finding(
            f"{facts.world_size} processes for {tensor} x {pipeline} x {context} = {model_size}, which leaves no whole"
            " data-parallel size",
            f"Start {model_size} processes or a multiple (`torchrun --nproc-per-node {model_size} -m skyrl_mega.train ...`), or"
            " set `parallel.tensor=1`.",
        )


@rule("`parallel.tensor` must divide the model's attention heads, KV heads and FFN size (the vocabulary is padded)")
def _tensor_divides_model(config: Config, facts: Facts) -> Iterator[Finding]:
    model, tensor = facts.model, config.parallel.tensor
    if model is None or tensor < 1:
        return
    sizes = {"attention heads": model.num_heads, "KV heads": model.num_kv_heads}
    if model.experts is None or model.experts.dense_layers:
        sizes["FFN size"] = model.ffn_size
    if model.experts is not None and model.experts.shared_ffn_size:
        sizes["shared expert's FFN size"] = model.experts.shared_ffn_size
    odd = [f"{size} {name}" for name, size in sizes.items() if size % tensor]
    if odd:
        fitting = [n for n in range(1, model.num_kv_heads + 1) if all(size % n == 0 for size in sizes.values())]
        yield Finding(
            f"`parallel.tensor` is {tensor} and the model has {', '.join(odd)}",
            f"Sizes that fit this model: {', '.join(map(str, fitting))}.",
        )


@rule("`parallel.sequence_parallel` needs `parallel.tensor` > 1")
def _sequence_parallel_needs_tensor(config: Config, facts: Facts) -> Iterator[Finding]:
    if config.parallel.sequence_parallel and config.parallel.tensor == 1:
        yield Finding(
            "`parallel.sequence_parallel` is true and `parallel.tensor` is 1",
            "Set `parallel.sequence_parallel=false`, or choose `parallel=tp2_sp`.",
        )


@rule("`parallel.overlap_param_gather` needs `parallel.overlap_grad_reduce` and `parallel.distributed_optimizer`")
def _param_gather_overlaps_with_the_rest(config: Config, facts: Facts) -> Iterator[Finding]:
    parallel = config.parallel
    if parallel.overlap_param_gather and not (parallel.overlap_grad_reduce and parallel.distributed_optimizer):
        yield Finding(
            f"they are {str(parallel.overlap_grad_reduce).lower()} and {str(parallel.distributed_optimizer).lower()}",
            "Set both, or `parallel.overlap_param_gather=false`.",
        )


@rule("`parallel.overlap_tensor` needs `parallel.sequence_parallel`: what it overlaps is that mode's gathers and scatters")
def _tensor_overlap_needs_sequence_parallel(config: Config, facts: Facts) -> Iterator[Finding]:
    if config.parallel.overlap_tensor and not config.parallel.sequence_parallel:
        yield Finding("`parallel.sequence_parallel` is false", "Set it, or `parallel.overlap_tensor=false`.")


@rule("Every data-parallel process needs a sequence in every update")
def _sequences_for_every_rank(config: Config, facts: Facts) -> Iterator[Finding]:
    trainer = config.trainer
    ranks = data_parallel_size(config, facts.world_size)
    if trainer.updates_per_step < 1:
        return
    sequences = trainer.prompts_per_step * trainer.samples_per_prompt // trainer.updates_per_step
    if sequences < ranks:
        yield Finding(
            f"{trainer.prompts_per_step} prompts x {trainer.samples_per_prompt} samples / {trainer.updates_per_step} updates = "
            f"{sequences} sequences for a data-parallel size of {ranks}",
            "Raise `trainer.prompts_per_step`, lower `trainer.updates_per_step`, or start fewer processes.",
        )
