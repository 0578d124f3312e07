"""Every setting, typed, with its default and its one-line meaning. No logic: rules live in `validate.py`.

Each field is declared with `opt(default, doc)`; the configuration reference in `docs/configuration.md` is generated from
these lines. All classes are frozen: a loaded configuration never changes.

The batch words, which can't be read two ways:

- `prompts_per_step`: distinct prompts drawn for one step of the loop.
- `samples_per_prompt`: trajectories sampled from each (the group).
- `updates_per_step`: optimizer updates made from one step's trajectories; each sees prompts_per_step / updates_per_step
  groups.
- `tokens_per_micro_batch`: packed tokens in one forward/backward on one data-parallel rank. Changes memory and speed, never
  the result.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Literal


def opt(default: Any, doc: str, *, factory: Any = None) -> Any:
    """A dataclass field with a default (or a default factory) and its documentation."""
    if factory is not None:
        return field(default_factory=factory, metadata={"doc": doc})
    return field(default=default, metadata={"doc": doc})


#: Marks a setting that has no default: a recipe, or the user, gives it.
REQUIRED: Any = "???"

Dtype = Literal["bfloat16", "float32"]
Device = Literal["auto", "cpu", "cuda"]


@dataclass(frozen=True)
class ModelConfig:
    """Which model is trained, and in which numbers."""

    path: str = opt(REQUIRED, "Directory of a Hugging Face model (config.json, *.safetensors, tokenizer files).")
    dtype: Dtype = opt("bfloat16", "Weights and activations of the policy; bfloat16 keeps float32 masters in the optimizer.")
    attention: Literal["auto", "sdpa", "flash", "transformer_engine"] = opt(
        "auto", "Packed attention: torch SDPA, flash-attn varlen, or TransformerEngine. auto: what the device has, best first."
    )
    recompute: Literal["none", "selective", "full"] = opt(
        "none", "Recompute activations in the backward pass: those of recompute_modules, or whole layers."
    )
    recompute_modules: tuple[str, ...] = opt(
        None,
        "What recompute=selective recomputes in every layer: attention (core_attn), feed-forward (mlp), experts (moe).",
        factory=lambda: ("core_attn",),
    )
    recompute_layers: int = opt(0, "How many layers of a stage recompute=full recomputes; 0: all.")
    offload_layers: int = opt(0, "Layers of each stage whose activations wait in host memory for the backward pass (CUDA).")
    fp8: Literal["off", "delayed", "tensorwise", "blockwise", "mxfp8"] = opt(
        "off", "Matrix products of the layers in 8 bits, by this scaling recipe of TransformerEngine (CUDA)."
    )
    logprob_chunk_tokens: int = opt(1024, "Rows of the LM head computed at once; bounds the [rows, vocabulary] logits.")
    kernels: Literal["auto", "reference", "cpu", "triton"] = opt(
        "auto", "LM-head kernels: torch reference, C++ for CPU, Triton. auto: SKYRL_MEGA_KERNELS, else the best that can run."
    )
    fused_loss: Literal["auto", "on", "off"] = opt(
        "auto", "Compute LM head and loss in one pass, logits once; auto: where the loss is a sum over tokens."
    )
    moe_aux_loss_coef: float = opt(
        0.0, "Weight of the load-balancing loss of mixture-of-experts routers (arXiv:2101.03961), per micro-batch; 0: none."
    )


@dataclass(frozen=True)
class ParallelConfig:
    """How the trainer's processes share the model.

    What remains is data parallel: world size / (tensor x pipeline x context) copies. Experts are laid over the same processes
    once more: world size / (expert x expert_tensor x pipeline) copies of each.
    """

    tensor: int = opt(1, "Tensor-parallel size; must divide attention heads, KV heads and FFN size.")
    pipeline: int = opt(1, "Pipeline-parallel size; must divide the number of layers.")
    virtual_pipeline: int = opt(
        1, "Model chunks per pipeline stage, interleaved to shorten the pipeline's idle time; tensor traffic grows with it."
    )
    context: int = opt(1, "Context-parallel size: ranks that share every sequence, each computing an equal part of its tokens.")
    expert: int = opt(1, "Expert-parallel size: processes that share a layer's experts; must divide their number.")
    expert_tensor: int = opt(1, "Processes that share one expert's matrices (CUDA only; 1 keeps experts whole).")
    sequence_parallel: bool = opt(False, "Shard norm and dropout activations along the sequence over tensor ranks.")
    distributed_optimizer: bool = opt(True, "Shard optimizer state over data-parallel ranks (no effect with one rank).")
    overlap_grad_reduce: bool = opt(False, "Reduce gradients over data-parallel ranks while the last backward pass still runs.")
    overlap_param_gather: bool = opt(
        False, "Gather updated weights while the next update's forward runs; pays with updates_per_step > 1."
    )
    overlap_tensor: bool = opt(
        False, "Overlap tensor-parallel exchange with matrix products (CUDA, TransformerEngine, sequence_parallel)."
    )
    timeout_s: float = opt(600.0, "Deadline of every wait between ranks, rollouts of rank 0 included; a late rank ends the job.")


@dataclass(frozen=True)
class KLConfig:
    """Distance kept to the frozen reference model; a reference is loaded only when it is used."""

    coef: float = opt(0.0, "Weight of the KL term in the loss; 0 loads no reference model.")
    estimator: Literal["k1", "k2", "k3"] = opt("k3", "Per-token estimator of KL(policy || reference), after Schulman 2020.")


@dataclass(frozen=True)
class AlgorithmConfig:
    """Advantages, loss and reduction."""

    advantage: Literal["grpo"] = opt("grpo", "Advantage estimator: grpo, arXiv:2402.03300.")
    normalize_by_std: bool = opt(
        True, "Divide group-centred rewards by the group's unbiased standard deviation (False: Dr. GRPO)."
    )
    advantage_eps: float = opt(1e-6, "Added to that standard deviation.")
    policy_loss: Literal["ppo_clip"] = opt("ppo_clip", "Policy loss: clipped surrogate, arXiv:1707.06347.")
    clip_low: float = opt(0.2, "Ratios below 1 - clip_low are clipped.")
    clip_high: float = opt(0.28, "Ratios above 1 + clip_high are clipped (DAPO's clip-higher, arXiv:2503.14476).")
    reduction: Literal["token_mean", "sequence_mean"] = opt(
        "token_mean", "Loss average over the update's whole batch: over its tokens, or over its sequences' token means."
    )
    entropy_coef: float = opt(0.0, "Weight of the entropy bonus.")
    kl: KLConfig = opt(None, "Distance to the reference model.", factory=KLConfig)


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW as Megatron-Core runs it."""

    lr: float = opt(1e-6, "Learning rate after warm-up.")
    warmup_updates: int = opt(0, "Optimizer updates over which the learning rate rises linearly from 0.")
    beta1: float = opt(0.9, "AdamW beta1.")
    beta2: float = opt(0.999, "AdamW beta2.")
    eps: float = opt(1e-8, "AdamW epsilon.")
    weight_decay: float = opt(0.0, "Decoupled weight decay; never applied to norms and biases.")
    offload: bool = opt(False, "Keep moments and float32 masters in host memory, but for the update itself (CUDA).")
    clip_grad_norm: float = opt(1.0, "Global gradient norm limit; 0 turns clipping off.")


@dataclass(frozen=True)
class RolloutConfig:
    """The engine that samples, and how it samples."""

    engine: Literal["vllm"] = opt("vllm", "Rollout engine.")
    placement: Literal["auto", "in_process", "child_process"] = opt(
        "auto", "Where the engine runs; auto: in the trainer's process at world size 1, else in a child process of rank 0."
    )
    dtype: Dtype = opt("bfloat16", "Weights of the engine; pairs with model.dtype.")
    temperature: float = opt(1.0, "Sampling temperature of training rollouts.")
    top_p: float = opt(1.0, "Nucleus sampling; 1.0 is off.")
    top_k: int = opt(0, "Top-k sampling; 0 is off.")
    max_new_tokens: int = opt(256, "Most tokens sampled in one turn.")
    max_model_len: int = opt(1024, "Most tokens of one whole trajectory, prompt included.")
    stop: tuple[str, ...] = opt(None, "Strings that end a turn.", factory=tuple)
    max_num_seqs: int = opt(256, "Sequences the engine decodes at once.")
    kv_cache_gib: int = opt(1, "KV cache on CPU, whole GiB.")
    gpu_memory_utilization: float = opt(0.45, "Share of GPU memory the engine may take (CUDA).")
    enforce_eager: bool = opt(True, "Run the engine without CUDA graphs or torch.compile.")
    weight_bucket_mib: int = opt(64, "Most MiB of weights in flight at once; whole fused groups.")
    probe_after_sync: bool = opt(False, "After each weight sync compare engine and policy logprobs on a few sequences.")
    probe_tolerance: float = opt(0.0, "Largest mean |logprob difference| the probe accepts; 0: 1e-3 in float32, 0.1 in bfloat16.")
    start_timeout_s: float = opt(300.0, "Deadline for the engine to come up.")


@dataclass(frozen=True)
class EnvConfig:
    """The task."""

    name: str = opt(REQUIRED, "Registered environment: arithmetic, reasoning_gym, gsm8k, or module:Class of your own.")
    options: dict[str, Any] = opt(None, "Keyword arguments of the environment and its prompt generator.", factory=dict)
    max_turns: int = opt(1, "Most policy turns in one episode; a longer one is truncated.")
    chat_template: bool = opt(
        True, "Render observations through the tokenizer's chat template; False: continue them as raw text."
    )


@dataclass(frozen=True)
class DataConfig:
    """Where prompts come from."""

    source: Literal["generator", "jsonl", "parquet", "hf_dataset"] = opt(
        "generator", "generator: the environment makes prompts by seed; else rows of data.path become the payloads."
    )
    path: str = opt("", "File (jsonl, parquet) or directory (datasets.save_to_disk) of training rows.")
    eval_path: str = opt("", "The same for held-out rows; empty: held out of data.path by a hash of the row.")
    limit: int = opt(0, "Use only the first rows; 0: all.")


@dataclass(frozen=True)
class EvalConfig:
    """Greedy accuracy on held-out prompts."""

    interval_steps: int = opt(0, "Evaluate every so many steps; 0: only before the first and after the last.")
    num_prompts: int = opt(128, "Held-out prompts; 0 turns evaluation off.")


@dataclass(frozen=True)
class CheckpointConfig:
    """Saving and resuming."""

    interval_steps: int = opt(50, "Save every so many steps, and after the last; 0: never.")
    asynchronous: bool = opt(True, "Write beside the next steps, from a copy in host memory; false: write in place, no copy.")
    keep_last: int = opt(2, "Checkpoints kept, newest first.")
    keep_best: int = opt(0, "Further checkpoints kept: the best by best_metric; 0: none.")
    best_metric: str = opt("eval/accuracy", "Metric of the step, as in metrics.jsonl, that keep_best goes by.")
    best_is: Literal["higher", "lower"] = opt("higher", "Which values of best_metric are better.")
    verify: Literal["sizes", "checksums"] = opt(
        "checksums", "What is checked before a checkpoint is resumed; checksums read every file once, shared by the ranks."
    )
    timeout_s: float = opt(1800.0, "Deadline of every wait for a save in flight.")
    resume: Literal["auto", "never", "must"] = opt(
        "auto",
        "auto: continue the run directory's newest whole checkpoint, if there is one; must: the newest, or an error; never: "
        "refuse a used directory.",
    )
    export_hf: bool = opt(True, "Write the final policy as a Hugging Face directory.")


@dataclass(frozen=True)
class TelemetryConfig:
    """Where numbers go. metrics.jsonl is always written."""

    trackers: tuple[str, ...] = opt(None, "Further trackers: tensorboard, wandb, mlflow.", factory=lambda: ("tensorboard",))
    project: str = opt("skyrl_mega", "Project name at the trackers.")
    trace: bool = opt(False, "Write a Chrome trace (trace.json) of every step's phases.")
    progress: Literal["auto", "bar", "lines"] = opt("auto", "Terminal display; auto: a bar on a terminal, lines elsewhere.")


@dataclass(frozen=True)
class TrainerConfig:
    """The loop."""

    prompts_per_step: int = opt(32, "Distinct prompts drawn for one step.")
    samples_per_prompt: int = opt(8, "Trajectories sampled from each prompt.")
    updates_per_step: int = opt(1, "Optimizer updates made from one step's trajectories; must divide prompts_per_step.")
    tokens_per_micro_batch: int = opt(4096, "Packed tokens in one forward/backward on one data-parallel rank.")
    share_prompts: Literal["auto", "on", "off"] = opt(
        "auto", "Compute a prompt once for all samples of its group (exact); auto: unless attention is TransformerEngine's."
    )
    max_steps: int = opt(100, "Steps of the loop.")
    max_staleness: int = opt(0, "Weight versions a trajectory may lag behind; 0: synchronous.")
    seed: int = opt(0, "Seed of prompts and sampling.")
    device: Device = opt("auto", "auto: cuda where it exists, else cpu.")
    threads: int = opt(1, "torch threads of each process on CPU; more help only on idle cores.")
    run_dir: str = opt("runs/default", "Everything the run writes goes here.")
    record_steps: tuple[int, ...] = opt(
        None, "Steps to record for `skyrl-mega replay`; a step that fails on a number is recorded unasked.", factory=tuple
    )


@dataclass(frozen=True)
class Config:
    """The whole configuration of a training run."""

    model: ModelConfig = opt(None, "The policy.", factory=ModelConfig)
    parallel: ParallelConfig = opt(None, "Sharding.", factory=ParallelConfig)
    algorithm: AlgorithmConfig = opt(None, "What is optimised.", factory=AlgorithmConfig)
    optimizer: OptimizerConfig = opt(None, "How it is optimised.", factory=OptimizerConfig)
    rollout: RolloutConfig = opt(None, "Sampling.", factory=RolloutConfig)
    env: EnvConfig = opt(None, "The task.", factory=EnvConfig)
    data: DataConfig = opt(None, "Prompts.", factory=DataConfig)
    evaluation: EvalConfig = opt(None, "Held-out accuracy.", factory=EvalConfig)
    checkpoint: CheckpointConfig = opt(None, "Saving and resuming.", factory=CheckpointConfig)
    telemetry: TelemetryConfig = opt(None, "Metrics.", factory=TelemetryConfig)
    trainer: TrainerConfig = opt(None, "The loop.", factory=TrainerConfig)


def as_dict(config: Any) -> dict[str, Any]:
    """A configuration dataclass as plain nested dicts and lists (for YAML and JSON)."""
    plain = dataclasses.asdict(config)

    def listify(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: listify(item) for key, item in value.items()}
        return [listify(item) for item in value] if isinstance(value, (tuple, list)) else value

    return listify(plain)
