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
    offload_frozen: bool = opt(
        False, "Keep the weights of a reference and of a teacher in host memory but for their forward passes (CUDA)."
    )
    fp8: Literal["off", "delayed", "tensorwise", "blockwise", "mxfp8"] = opt(
        "off", "Matrix products of the layers in 8 bits, by this scaling recipe of TransformerEngine (CUDA)."
    )
    logprob_chunk_tokens: int = opt(1024, "Rows of the LM head computed at once; bounds the [rows, vocabulary] logits.")
    kernels: Literal["auto", "reference", "cpu", "triton"] = opt(
        "auto",
        "Kernels of head and loss: torch reference, C++ for CPU, Triton. auto: SKYRL_MEGA_KERNELS, else the best that can run.",
    )
    fused_loss: Literal["auto", "on", "off"] = opt(
        "auto", "Compute LM head and loss in one pass, logits once; auto: where the loss is a sum over tokens."
    )
    moe_aux_loss_coef: float = opt(
        0.0, "Weight of the load-balancing loss of mixture-of-experts routers (arXiv:2101.03961), per micro-batch; 0: none."
    )
    moe_z_loss_coef: float = opt(
        0.0, "Weight of the loss that keeps those routers' logits small (arXiv:2202.08906, eq. 5), per token; 0: none."
    )
    moe_bias_update_rate: float = opt(
        0.0,
        "By how much each update moves the experts' biases of DeepSeek-V3's and GLM-4's routers towards an even load"
        " (arXiv:2408.15664); 0: they stay as loaded.",
    )
    router_replay: Literal["off", "rollout", "old"] = opt(
        "off",
        "Send tokens to the experts that the rollout engine chose (R3, arXiv:2510.11370), or the old-logprobs pass of a step with"
        " several updates; docs/moe.md.",
    )
    freeze_router: bool = opt(False, "Keep mixture-of-experts routers as they were loaded: no gradient, no update, no decay.")


@dataclass(frozen=True)
class AdapterConfig:
    """Low-rank adapters (LoRA, arXiv:2106.09685): train two thin matrices beside each projection; docs/lora.md."""

    rank: int = opt(0, "Rank of the adapters; 0: train the whole model.")
    alpha: float = opt(32.0, "The adapters' output is scaled by alpha / rank.")
    use_rslora: bool = opt(False, "Scale by alpha / sqrt(rank) instead (arXiv:2312.03732).")
    targets: tuple[str, ...] = opt(
        None,
        "Projections that get an adapter, by the last part of their Hugging Face names (q_proj, o_proj, down_proj ...); all:"
        " every one in attention, feed-forward and experts.",
        factory=lambda: ("all",),
    )
    experts: bool = opt(True, "Adapt the matrices of routed experts too, where targets name them.")
    path: str = opt("", "PEFT adapter directory to begin with; empty: a fresh adapter, which changes nothing yet.")


@dataclass(frozen=True)
class LoraConfig(AdapterConfig):
    """Low-rank adapters (LoRA, arXiv:2106.09685): train two thin matrices beside each projection; docs/lora.md."""

    sync: Literal["auto", "adapter", "merged"] = opt(
        "auto",
        "What engines get after each step: the adapter alone, or whole weights with it merged in; auto: the adapter where every"
        " engine is one of the run's own and no expert has an adapter.",
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

    coef: float = opt(0.0, "Weight of the KL term; 0 loads no reference model.")
    estimator: Literal["k1", "k2", "k3", "abs", "k1+", "k3+"] = opt(
        "k3", "Per-token estimator of KL(policy || reference), after Schulman 2020; with a + it has the gradient of k2."
    )
    place: Literal["loss", "reward"] = opt("loss", "Add the KL term to the loss, or take it from each token's reward.")
    target: float = opt(
        0.0,
        "Mean KL per trained token that the coefficient is steered to, beginning at coef (arXiv:1909.08593); 0: coef is fixed.",
    )
    horizon: int = opt(10_000, "Samples in which a KL of 1.2 targets or more multiplies the coefficient by about 1.22.")


@dataclass(frozen=True)
class OffPolicyConfig:
    """Importance weights for tokens of an older policy, or of the engine's other arithmetic; docs/off_policy.md."""

    stages: tuple[dict[str, Any], ...] = opt(
        None,
        "Factors of each token's policy loss, made from policy / engine probability, as `{name: truncated_is, cap: 2.0}`: their"
        " product is the weight.",
        factory=tuple,
    )


@dataclass(frozen=True)
class AlgorithmConfig:
    """Advantages, loss and reduction; docs/algorithms.md explains every name."""

    advantage: str = opt(
        "grpo", "Advantage estimator: a name of docs/algorithms.md, or a function of your own: my_file.py:function."
    )
    advantage_options: dict[str, Any] = opt(None, "Options of that estimator, as `normalize_by_std: false`.", factory=dict)
    normalize_advantages: bool = opt(False, "Give the advantages of a step's trained tokens mean 0 and variance 1.")
    policy_loss: str = opt(
        "ppo_clip", "Policy loss: a name of docs/algorithms.md, or a function of your own: my_file.py:function."
    )
    loss_options: dict[str, Any] = opt(None, "Options of that loss, as `clip_high: 0.3`.", factory=dict)
    old_logprobs: Literal["policy", "rollout"] = opt(
        "policy",
        "What the loss's ratio is taken against: the policy before the step's first update, or the engine that sampled (then the"
        " clipping bounds the distance to it, and off_policy.stages may mask but not weigh).",
    )
    reduction: Literal["token_mean", "sequence_mean", "sequence_sum_norm", "prompt_mean"] = opt(
        "token_mean",
        "Loss average over the update's whole batch: over its tokens; over its sequences' token means; over its sequences' sums"
        " divided by reduction_length; over its prompts' token means.",
    )
    reduction_length: int = opt(0, "What sequence_sum_norm divides by; 0: rollout.max_new_tokens.")
    entropy_coef: float = opt(0.0, "Weight of the entropy bonus.")
    kl: KLConfig = opt(None, "Distance to the reference model.", factory=KLConfig)
    off_policy: OffPolicyConfig = opt(None, "Correction for what the policy did not sample.", factory=OffPolicyConfig)


@dataclass(frozen=True)
class RewardShapingConfig:
    """Rewards as advantages see them: scale x clipped reward + shift. The ledger and reward/mean keep the raw ones."""

    clip: tuple[float, ...] = opt(None, "Bounds [low, high] of the raw reward; empty: none.", factory=tuple)
    scale: float = opt(1.0, "Factor of the clipped reward.")
    shift: float = opt(0.0, "Added to it.")


@dataclass(frozen=True)
class OverlongConfig:
    """Responses at or near their length limit (DAPO, arXiv:2503.14476, section 3.4)."""

    filter: bool = opt(
        False, "Train no token of a trajectory that a limit (tokens, turns) cut off; it stays in its group's statistics."
    )
    penalty_tokens: int = opt(
        0, "Last tokens before rollout.max_new_tokens over which a penalty of the reward grows linearly; 0: none."
    )
    penalty: float = opt(1.0, "That penalty at the limit, in units of the shaped reward.")


@dataclass(frozen=True)
class ReplayConfig:
    """Groups that are trained again in later steps; needs algorithm.off_policy.stages."""

    share: float = opt(0.0, "Groups replayed in a step, as a share of trainer.prompts_per_step, on top of them; 0: none.")
    max_age: int = opt(4, "Steps after its first training in which a group may be replayed.")


@dataclass(frozen=True)
class SamplingConfig:
    """What is trained on, and how often; docs/howto/sampling.md."""

    dynamic: bool = opt(
        False, "Leave groups without a learning signal (all rewards equal) out and sample others instead (arXiv:2503.14476)."
    )
    max_resampled: float = opt(20.0, "Groups that dynamic sampling may leave out for one step, in steps' worth of groups.")
    when_exhausted: Literal["error", "train"] = opt(
        "error", "When so many are left out: end the run, or fill the step with groups that have no signal."
    )
    zero_variance: Literal["keep", "drop"] = opt(
        "keep", "Groups whose advantages are all zero: count in the loss's averages, or leave them out of those too."
    )
    curriculum: Literal["none", "success"] = opt(
        "none", "success: draw prompts more often the nearer their past success rate is to one half (rows, or data.limit)."
    )
    reward: RewardShapingConfig = opt(None, "Rewards as advantages see them.", factory=RewardShapingConfig)
    overlong: OverlongConfig = opt(None, "Responses at or near their length limit.", factory=OverlongConfig)
    replay: ReplayConfig = opt(None, "Groups that are trained again.", factory=ReplayConfig)


@dataclass(frozen=True)
class TeacherConfig:
    """The model that on-policy distillation learns from; docs/howto/distill.md."""

    path: str = opt(
        "",
        "Directory of a Hugging Face model with the policy's vocabulary; for algorithm.advantage=distill and"
        " algorithm.policy_loss=distill_topk, which load it in the policy's layout. With url only its config.json and tokenizer"
        " are read.",
    )
    url: str = opt("", "A vLLM server of the teacher, asked at url/v1/completions; empty: it is loaded beside the policy.")
    served_name: str = opt("", "With url: the model's name there; empty: the server's only one.")
    timeout_s: float = opt(300.0, "With url: deadline of one request.")
    retries: int = opt(4, "With url: further attempts after lost connections, timeouts, overload and server errors.")
    topk: int = opt(0, "How many of its likeliest tokens at each position policy_loss=distill_topk compares.")


@dataclass(frozen=True)
class WarmupConfig:
    """Supervised updates before the first step: the policy imitates responses, and starts from there; docs/howto/warm_up.md."""

    steps: int = opt(0, "Supervised updates before the first step; 0: none.")
    path: str = opt(
        "", 'File of rows {"prompt": ..., "response": ...} or {"messages": [...]} (jsonl); only the responses are trained.'
    )
    batch_size: int = opt(32, "Rows of one update.")
    lr: float = opt(0.0, "Learning rate of these updates; 0: optimizer.lr.")


@dataclass(frozen=True)
class MuonConfig:
    """Muon's own settings (arXiv:2502.16982); lr and weight_decay are the optimizer's."""

    momentum: float = opt(0.95, "Share of the momentum that an update keeps.")
    nesterov: bool = opt(True, "Orthogonalise the momentum one step ahead.")
    steps: int = opt(5, "Newton-Schulz steps.")
    scale: Literal["rms", "spectral"] = opt(
        "rms", "Size of an update of an [A, B] matrix: 0.2 sqrt(max(A, B)), for AdamW's learning rates; sqrt(max(1, A / B))."
    )


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW as Megatron-Core runs it, or Muon; docs/optimizers.md."""

    name: Literal["adamw", "muon"] = opt(
        "adamw", "muon: the matrices of the layers by Muon, all else by AdamW; needs parallel.distributed_optimizer=false."
    )
    lr: float = opt(1e-6, "Learning rate after warm-up: the highest.")
    schedule: Literal["constant", "cosine", "linear", "wsd"] = opt(
        "constant",
        "The learning rate after warm-up: constant; falling to the end along half a cosine (arXiv:1608.03983) or a line; or"
        " constant, and falling in the last decay_updates only (wsd, arXiv:2404.06395).",
    )
    warmup_updates: int = opt(0, "Optimizer updates over which the learning rate rises linearly from 0.")
    decay_updates: int = opt(
        0,
        "Updates over which the learning rate falls. 0: cosine and linear, all after warm-up; wsd, a tenth of total_updates.",
    )
    total_updates: int = opt(0, "Update at which the schedule is at its end; 0: the last that the run plans.")
    min_lr_ratio: float = opt(0.0, "What is left of lr at the schedule's end, as a share of it.")
    wsd_decay: Literal["linear", "cosine", "sqrt", "exponential"] = opt(
        "sqrt", "How wsd falls: p is the share of decay_updates made, sqrt is 1 - sqrt(p) (arXiv:2405.18392)."
    )
    beta1: float = opt(0.9, "AdamW beta1.")
    beta2: float = opt(0.999, "AdamW beta2.")
    eps: float = opt(1e-8, "AdamW epsilon.")
    weight_decay: float = opt(0.0, "Decoupled weight decay; never applied to norms and biases.")
    offload: bool = opt(False, "Keep moments and float32 masters in host memory, but for the update itself (CUDA).")
    clip_grad_norm: float = opt(1.0, "Global gradient norm limit; 0 turns clipping off.")
    muon: MuonConfig = opt(None, "Settings of Muon.", factory=MuonConfig)


@dataclass(frozen=True)
class CriticOptimizerConfig(OptimizerConfig):
    """AdamW of the critic, as `optimizer` is that of the policy."""

    lr: float = opt(1e-5, "Learning rate after warm-up; a critic learns by regression and takes larger steps than a policy.")


@dataclass(frozen=True)
class CriticParallelConfig:
    """The critic's own layout over the policy's processes; 0 and auto: as `parallel` has it."""

    tensor: int = opt(0, "Tensor-parallel size.")
    pipeline: int = opt(0, "Pipeline-parallel size.")
    virtual_pipeline: int = opt(0, "Model chunks per pipeline stage.")
    context: int = opt(0, "Context-parallel size.")
    expert: int = opt(0, "Expert-parallel size.")
    expert_tensor: int = opt(0, "Processes that share one expert's matrices.")
    sequence_parallel: Literal["auto", "on", "off"] = opt(
        "auto", "Shard activations along the sequence; auto: with a tensor size of its own wherever that is above 1."
    )


@dataclass(frozen=True)
class CriticConfig:
    """The value function of PPO; built where `algorithm.advantage` needs values (gae), and without effect elsewhere."""

    path: str = opt(
        "",
        "Directory of its first weights; empty: model.path. The value head is score.weight (one label), or zero where there is"
        " none.",
    )
    loss: Literal["clipped", "mse", "huber"] = opt(
        "clipped", "Value loss; clipped: squared error that stops pulling once a value has moved by value_clip (PPO)."
    )
    value_clip: float = opt(0.2, "How far a value may move in one step (loss=clipped); in the rewards' units.")
    huber_delta: float = opt(1.0, "Error beyond which loss=huber grows linearly.")
    warmup_steps: int = opt(0, "First steps of the run that train the critic only.")
    optimizer: CriticOptimizerConfig = opt(None, "How it is optimised.", factory=CriticOptimizerConfig)
    parallel: CriticParallelConfig = opt(None, "How the processes share it.", factory=CriticParallelConfig)


@dataclass(frozen=True)
class RolloutConfig:
    """The engine that samples, and how it samples."""

    engine: Literal["vllm"] = opt("vllm", "Rollout engine.")
    placement: Literal["auto", "in_process", "child_process", "ray"] = opt(
        "auto",
        "Where engines run: in the trainer's process (one process, synchronous), in a child process of rank 0, or as Ray actors;"
        " auto: the first of these that the layout, num_engines and max_staleness allow.",
    )
    num_engines: int = opt(1, "Engines of the fleet (more than one needs placement=ray).")
    engine_tensor: int = opt(1, "Tensor-parallel size inside each engine.")
    engine_pipeline: int = opt(1, "Pipeline-parallel size inside each engine (CUDA only).")
    engine_data: int = opt(1, "Data-parallel size inside each engine (CUDA only; for mixtures of experts, else use num_engines).")
    colocated: bool = opt(True, "Engines share the trainer's GPUs and take turns (sleep, wake); False: GPUs of their own.")
    external_urls: tuple[str, ...] = opt(
        None,
        "OpenAI-compatible vLLM servers that join the fleet (token ids in and out); they load weights like the others.",
        factory=tuple,
    )
    ray_address: str = opt("auto", "Ray cluster to join; auto: RAY_ADDRESS or a cluster on this machine, else start one.")
    max_concurrent_requests: int = opt(0, "Requests in flight per engine; 0: max_num_seqs. The others wait in the router.")
    request_timeout_s: float = opt(300.0, "Deadline of one request on one engine; an engine that misses it is taken for hung.")
    request_attempts: int = opt(3, "Engines that a request is tried on before the run fails.")
    health_interval_s: float = opt(10.0, "Seconds between two health checks of an engine; three missed ones and it is replaced.")
    max_engine_restarts: int = opt(10, "Restarts of one engine before it is given up.")
    oversampling: float = opt(
        0.0, "Extra groups begun per step, as a share; the slowest are ended early once a step is full, and begun again later."
    )
    dtype: Dtype = opt("bfloat16", "Weights of the engine; pairs with model.dtype.")
    quantization: Literal["none", "fp8"] = opt(
        "none",
        "fp8: weights of linear layers travel as 8-bit numbers with a scale per channel, and engines multiply 8-bit numbers.",
    )
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
    weight_bucket_mib: int = opt(64, "Most MiB of weights in one bucket of whole fused groups; two are in flight.")
    weight_transport: Literal["auto", "shm", "gloo", "nccl", "cuda_ipc"] = opt(
        "auto", "How weights reach engines; auto: shm or cuda_ipc where colocated or on this machine, else gloo or nccl."
    )
    weight_delta: bool = opt(False, "Send only changed blocks of the weights, compressed, for slow links.")
    kv_cache_on_update: Literal["keep", "recompute"] = opt(
        "recompute", "What requests in flight do after a weight update: go on with old keys and values, or compute them again."
    )
    probe_after_sync: bool = opt(False, "After each weight sync compare engine and policy logprobs on a few sequences.")
    probe_tolerance: float = opt(
        0.0, "Largest mean |logprob difference| the probe accepts; 0: 1e-3 in float32, 0.1 in bfloat16, 0.3 in fp8."
    )
    start_timeout_s: float = opt(300.0, "Deadline for the engine to come up.")


@dataclass(frozen=True)
class EnvConfig:
    """The task."""

    name: str = opt(REQUIRED, "Registered environment: arithmetic, reasoning_gym, gsm8k, or module:Class of your own.")
    options: dict[str, Any] = opt(None, "Keyword arguments of the environment and its prompt generator.", factory=dict)
    max_turns: int = opt(1, "Most policy turns in one episode; a longer one is truncated.")
    timeout_s: float = opt(60.0, "Deadline of one call of the environment.")
    retries: int = opt(1, "Times an episode is begun again after its environment raised or ran out of time.")
    on_error: Literal["raise", "mask"] = opt(
        "raise", "When retries are used up: end the run, or leave the sample out of its group and count it."
    )
    chat_template: bool = opt(
        True, "Render observations through the tokenizer's chat template; False: continue them as raw text."
    )


@dataclass(frozen=True)
class RewardTerm:
    """What every kind of term has."""

    name: str = opt(REQUIRED, "Names the score in metrics (reward/<name>_mean) and in the trajectory; unique.")
    weight: float = opt(1.0, "The score times this is added to the trajectory's reward; 0 only reports it.")
    timeout_s: float = opt(60.0, "Deadline of one attempt.")
    retries: int = opt(0, "Further attempts after one that failed, each after a longer pause.")
    on_error: Literal["raise", "mask", "default"] = opt(
        "raise", "Where no attempt gave a score: end the run, leave the sample out of its group, or take the default. All count."
    )
    default: float = opt(0.0, "The score that on_error=default takes.")


@dataclass(frozen=True)
class FunctionTerm(RewardTerm):
    """A Python function: one `RewardInput` in, a number out; def or async def."""

    kind: Literal["function"] = opt("function", "A function of yours.")
    path: str = opt(REQUIRED, "module:function, or file.py:function.")
    options: dict[str, Any] = opt(None, "Its keyword arguments.", factory=dict)
    batched: bool = opt(False, "It takes the list of a group's inputs and returns the list of their scores.")


@dataclass(frozen=True)
class ModelTerm(RewardTerm):
    """A Hugging Face sequence-classification model: its output, before any sigmoid or softmax, for prompt and response."""

    kind: Literal["model"] = opt("model", "A reward model.")
    path: str = opt(REQUIRED, "Its directory; with url only config.json and the tokenizer are read.")
    url: str = opt("", "A vLLM server of the model (POST url/classify); empty: it is loaded beside the rollout coordinator.")
    retries: int = opt(4, "With url: further attempts after lost connections, timeouts, overload (429) and server errors (5xx).")
    output: int = opt(-1, "Which output is the score; -1: the model has only one.")
    device: Device = opt("auto", "Where it is loaded; auto: cuda where the coordinator sees it, else cpu.")
    dtype: Dtype = opt("bfloat16", "Its weights, where it is loaded here.")
    tokens_per_batch: int = opt(8192, "Tokens, padding included, in one forward pass or one request.")


@dataclass(frozen=True)
class JudgeTerm(RewardTerm):
    """A language model behind an OpenAI-compatible chat endpoint, asked at temperature 0."""

    kind: Literal["judge"] = opt("judge", "A language model as judge.")
    url: str = opt(REQUIRED, "Base URL up to /v1; requests go to url/chat/completions.")
    model: str = opt(REQUIRED, "The model's name there.")
    template: str = opt(REQUIRED, "The question: text with {prompt}, {response} and {reference}.")
    reference: str = opt("", "Key of the prompt's payload that {reference} stands for.")
    extract: Literal["regex", "json"] = opt("regex", "How the score is found in the answer.")
    pattern: str = opt(r"[Ss]core:\s*(-?\d+(?:\.\d+)?)", "regex: its only group is the score; the last match counts.")
    key: str = opt("score", "json: the score's key in the last JSON object that has it.")
    min_score: float = opt(0.0, "The score that becomes 0.")
    max_score: float = opt(10.0, "The score that becomes 1. A score outside of the two is none.")
    max_tokens: int = opt(512, "Most tokens of the answer.")
    concurrency: int = opt(16, "Requests in flight.")
    cache_size: int = opt(4096, "Answers kept: equal questions are asked once; 0: only those in flight are shared.")
    api_key_env: str = opt("", "Environment variable that holds the API key; empty: none is sent.")
    retries: int = opt(4, "Further attempts after lost connections, timeouts, overload (429) and server errors (5xx).")


AnyRewardTerm = FunctionTerm | ModelTerm | JudgeTerm


@dataclass(frozen=True)
class RewardConfig:
    """What a finished trajectory is worth: env_weight x the environment's reward + sum of weight x score over the terms."""

    env_weight: float = opt(1.0, "Weight of the environment's reward.")
    terms: tuple[AnyRewardTerm, ...] = opt(
        None, "Further scores, each a mapping {name, kind, weight, ...}; docs/howto/rewards.md.", factory=tuple
    )


@dataclass(frozen=True)
class DataConfig:
    """Where prompts come from."""

    source: Literal["generator", "jsonl", "parquet", "hf_dataset"] = opt(
        "generator", "generator: the environment makes prompts by seed; else rows of data.path become the payloads."
    )
    path: str = opt("", "File (jsonl, parquet) or directory (datasets.save_to_disk) of training rows.")
    eval_path: str = opt("", "The same for held-out rows; empty: held out of data.path by a hash of the row.")
    limit: int = opt(0, "Use only the first rows, or a generator's first prompts over and over; 0: all.")


@dataclass(frozen=True)
class EvalTask:
    """A further task to evaluate: its environment and data, set as the sections `env` and `data` of the run are."""

    name: str = opt(REQUIRED, "Names its metrics, eval/<name>/accuracy; letters, digits, `_`, `-` and `.`.")
    env: EnvConfig = opt(None, "Its environment: {name, options, max_turns, ...}.", factory=EnvConfig)
    data: DataConfig = opt(
        None, "Where its prompts come from: {source, path, ...}; only the held-out ones are used.", factory=DataConfig
    )
    num_prompts: int = opt(0, "Its held-out prompts; 0: evaluation.num_prompts.")
    samples_per_prompt: int = opt(0, "Samples of each; 0: evaluation.samples_per_prompt.")


@dataclass(frozen=True)
class EvalConfig:
    """Accuracy on held-out prompts, in training and by `skyrl-mega eval`; docs/howto/evaluate.md."""

    interval_steps: int = opt(0, "Evaluate every so many steps; 0: only before the first and after the last.")
    num_prompts: int = opt(128, "Held-out prompts; 0 turns evaluation off.")
    samples_per_prompt: int = opt(1, "Samples of each prompt; with several there are pass@k and majority vote.")
    temperature: float = opt(0.0, "Sampling temperature of evaluations; 0: greedy.")
    top_p: float = opt(1.0, "Nucleus sampling of evaluations; 1.0 is off.")
    top_k: int = opt(0, "Top-k sampling of evaluations; 0 is off.")
    pass_score: float = opt(1.0, "A sample passes (pass@k) if its accuracy, or else its reward, is at least this.")
    tasks: tuple[EvalTask, ...] = opt(None, "Further tasks, each a mapping {name, env, data, ...}.", factory=tuple)


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
    max_nonfinite_updates: int = opt(
        3,
        "Updates in a row that are left out because loss or gradient is not finite; one more ends the run. 0: the first does.",
    )
    max_staleness: int = opt(
        0,
        "Weight versions that a group's oldest token may lag behind when trained; 0: synchronous, 1: one step off, more:"
        " asynchronous.",
    )
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
    lora: LoraConfig = opt(None, "Adapters instead of the whole policy.", factory=LoraConfig)
    parallel: ParallelConfig = opt(None, "Sharding.", factory=ParallelConfig)
    algorithm: AlgorithmConfig = opt(None, "What is optimised.", factory=AlgorithmConfig)
    sampling: SamplingConfig = opt(None, "What is trained on.", factory=SamplingConfig)
    teacher: TeacherConfig = opt(None, "Distillation.", factory=TeacherConfig)
    warmup: WarmupConfig = opt(None, "Supervised updates first.", factory=WarmupConfig)
    optimizer: OptimizerConfig = opt(None, "How it is optimised.", factory=OptimizerConfig)
    critic: CriticConfig = opt(None, "The value function.", factory=CriticConfig)
    rollout: RolloutConfig = opt(None, "Sampling.", factory=RolloutConfig)
    env: EnvConfig = opt(None, "The task.", factory=EnvConfig)
    reward: RewardConfig = opt(None, "What a trajectory is worth.", factory=RewardConfig)
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
