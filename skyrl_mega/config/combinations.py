"""Which settings go together: with each other, with the model's shape and with the number of processes. Reads no file.

Every rule is a sentence and a function that yields its breaches; a function looks at nothing but its arguments. Rules of single
sections are in files of their own; `rules` has them all.
"""

from __future__ import annotations

from collections.abc import Iterator

from skyrl_mega.config.placement import needs_fleet, needs_own_process
from skyrl_mega.config.rule import Facts, Finding, RuleBook
from skyrl_mega.config.schema import Config

COMBINATIONS = RuleBook()
rule = COMBINATIONS.rule

_ELEMENT_BYTES = {"bfloat16": 2, "float32": 4}


# ---- memory ---------------------------------------------------------------------------------------------------------------


@rule("`model.recompute_modules` must name some of core_attn, mlp and moe where `model.recompute=selective`")
def _selective_recompute_names_modules(config: Config, facts: Facts) -> Iterator[Finding]:
    modules = config.model.recompute_modules
    if config.model.recompute == "selective" and (not modules or set(modules) - {"core_attn", "mlp", "moe"}):
        yield Finding(f"got {list(modules)}", "Set `model.recompute_modules=[core_attn]`, or `model.recompute=none`.")


@rule("`model.recompute_layers` counts what `model.recompute=full` recomputes, at most the layers of a pipeline stage")
def _recomputed_layers_exist(config: Config, facts: Facts) -> Iterator[Finding]:
    layers, stages = config.model.recompute_layers, config.parallel.pipeline * config.parallel.virtual_pipeline
    if layers > 0 and config.model.recompute != "full":
        yield Finding(f"`model.recompute` is {config.model.recompute}", "Set `model.recompute=full`, or leave the count out.")
    elif facts.model is not None and stages >= 1 and layers > facts.model.num_layers // stages:
        yield Finding(f"{layers} of {facts.model.num_layers // stages}", "Set `model.recompute_layers=0` for all of them.")


@rule(
    "`model.offload_layers` must be at most the layers of a pipeline stage (or chunk), and has nothing to move where all is"
    " recomputed"
)
def _offloaded_layers_exist(config: Config, facts: Facts) -> Iterator[Finding]:
    layers, stages = config.model.offload_layers, config.parallel.pipeline * config.parallel.virtual_pipeline
    if facts.model is not None and stages >= 1 and layers > facts.model.num_layers // stages:
        there = facts.model.num_layers // stages
        yield Finding(f"{layers} of {there}", f"Set `model.offload_layers={there}` or less.")
    if layers > 0 and config.model.recompute == "full":
        yield Finding("`model.recompute` is full", "Set `model.offload_layers=0`, or `model.recompute=selective`.")


@rule(
    "`model.fp8`, `model.offload_layers`, `model.offload_frozen`, `optimizer.offload`, `critic.optimizer.offload` and"
    " `parallel.overlap_tensor` are for CUDA: `trainer.device` must not be cpu"
)
def _cuda_settings_need_cuda(config: Config, facts: Facts) -> Iterator[Finding]:
    asked = {
        "model.fp8": config.model.fp8 != "off",
        "model.offload_layers": config.model.offload_layers > 0,
        "model.offload_frozen": config.model.offload_frozen,
        "optimizer.offload": config.optimizer.offload,
        "critic.optimizer.offload": config.critic.optimizer.offload,
        "parallel.overlap_tensor": config.parallel.overlap_tensor,
    }
    for name, is_asked in asked.items():
        if is_asked and config.trainer.device == "cpu":
            yield Finding(f"`{name}` is set and `trainer.device` is cpu", f"Leave `{name}` out, or set `trainer.device=cuda`.")


@rule("`model.fp8` needs `model.dtype=bfloat16`: the 8-bit products stand in for those of bfloat16")
def _fp8_is_over_bfloat16(config: Config, facts: Facts) -> Iterator[Finding]:
    if config.model.fp8 != "off" and config.model.dtype != "bfloat16":
        yield Finding(f"`model.dtype` is {config.model.dtype}", "Choose `precision=fp8`, or set `model.fp8=off`.")


# ---- processes ------------------------------------------------------------------------------------------------------------


@rule(
    "`rollout.placement=in_process` is for a single process that rolls out and trains in turns with one engine: inside one rank"
    " of several an engine would wait for the others forever, and it can't generate while that process trains"
)
def _in_process_takes_turns(config: Config, facts: Facts) -> Iterator[Finding]:
    asked = needs_own_process(config, facts.world_size)
    if config.rollout.placement == "in_process" and asked:
        yield Finding(f"got {', '.join(asked)}", "Set `rollout.placement=auto`.")


@rule("Several engines, and external servers, need `rollout.placement=ray`; `rollout.num_engines=0` needs external servers")
def _fleets_need_ray(config: Config, facts: Facts) -> Iterator[Finding]:
    asked = needs_fleet(config)
    if config.rollout.placement == "child_process" and asked:
        yield Finding(f"got {', '.join(asked)} and `rollout.placement=child_process`", "Set `rollout.placement=ray` or `auto`.")
    if config.rollout.num_engines == 0 and not config.rollout.external_urls:
        yield Finding("there is no engine at all", "Set `rollout.num_engines=1`, or name servers in `rollout.external_urls`.")


@rule("`rollout.engine_pipeline` and `rollout.engine_data` > 1 need cuda: vLLM's CPU build dies of the first request with them")
def _engine_layouts_need_cuda(config: Config, facts: Facts) -> Iterator[Finding]:
    rollout = config.rollout
    for name, size in (("engine_pipeline", rollout.engine_pipeline), ("engine_data", rollout.engine_data)):
        if size > 1 and config.trainer.device == "cpu":
            yield Finding(
                f"`rollout.{name}` is {size} and `trainer.device` is cpu",
                f"Set `rollout.{name}=1`; `rollout.engine_tensor` divides an engine too, and `rollout.num_engines` adds some.",
            )


@rule("`rollout.weight_transport` must fit the device: shm and gloo for CPU, cuda_ipc (same GPUs) and nccl (other GPUs) for CUDA")
def _transport_fits_device(config: Config, facts: Facts) -> Iterator[Finding]:
    transport, device = config.rollout.weight_transport, config.trainer.device
    if transport in ("cuda_ipc", "nccl") and device == "cpu":
        yield Finding(f"`rollout.weight_transport` is {transport} on cpu", "Set `rollout.weight_transport=auto`.")
    if transport == "cuda_ipc" and not config.rollout.colocated:
        yield Finding("it is cuda_ipc and `rollout.colocated` is false", "Set `rollout.weight_transport=nccl` or `auto`.")
    if transport == "nccl" and config.rollout.colocated:
        yield Finding(
            "it is nccl and `rollout.colocated` is true: NCCL does not connect two processes on one GPU",
            "Set `rollout.weight_transport=cuda_ipc` or `auto`.",
        )


@rule("`rollout.weight_delta` compares weights in host memory: it goes with the transports shm and gloo")
def _delta_is_in_host_memory(config: Config, facts: Facts) -> Iterator[Finding]:
    if config.rollout.weight_delta and config.rollout.weight_transport in ("nccl", "cuda_ipc"):
        yield Finding(
            f"`rollout.weight_transport` is {config.rollout.weight_transport}",
            "Set `rollout.weight_transport=gloo`, or `rollout.weight_delta=false`.",
        )


@rule(
    "`rollout.quantization=fp8` is for dense models without multi-latent attention, in bfloat16, whose whole weights go to"
    " engines of ours"
)
def _eight_bit_engines_are_possible(config: Config, facts: Facts) -> Iterator[Finding]:
    rollout, model = config.rollout, facts.model
    if rollout.quantization == "none":
        return
    if model is not None and (model.experts is not None or model.latent_size > 0):
        kind = "a mixture of experts" if model.experts is not None else "of multi-latent attention"
        yield Finding(f"the model (`{model.family}`) is {kind}", "Set `rollout.quantization=none`.")
    if rollout.dtype != "bfloat16":
        yield Finding(f"`rollout.dtype` is {rollout.dtype}", "Choose `precision=bfloat16`, or `rollout.quantization=none`.")
    if rollout.external_urls:
        yield Finding(
            f"`rollout.external_urls` is {list(rollout.external_urls)}",
            "Start the engines here, or set `rollout.quantization=none`.",
        )
    if config.lora.rank > 0 and config.lora.sync != "merged":
        yield Finding(f"`lora.sync` is {config.lora.sync}", "Set `lora.sync=merged`, or `rollout.quantization=none`.")


@rule("`parallel.timeout_s` should exceed `rollout.request_timeout_s`: else ranks give up before a hung engine is found out")
def _ranks_outwait_requests(config: Config, facts: Facts) -> Iterator[Finding]:
    ranks_s, request_s = config.parallel.timeout_s, config.rollout.request_timeout_s
    if facts.world_size > 1 and ranks_s <= request_s:
        yield Finding(
            f"they are {ranks_s:g} and {request_s:g}",
            f"Set `parallel.timeout_s={2 * request_s:g}`, or lower `rollout.request_timeout_s`.",
            is_warning=True,
        )


# ---- batch ----------------------------------------------------------------------------------------------------------------


@rule("`trainer.updates_per_step` must divide `trainer.prompts_per_step`")
def _updates_divide_prompts(config: Config, facts: Facts) -> Iterator[Finding]:
    prompts, updates = config.trainer.prompts_per_step, config.trainer.updates_per_step
    if updates < 1 or prompts % updates == 0:
        return
    below = max((n for n in range(1, updates) if prompts % n == 0), default=1)
    yield Finding(
        f"{prompts} prompts and {updates} updates",
        f"Try `trainer.updates_per_step={below}` or `trainer.prompts_per_step={updates}`.",
    )


@rule("`trainer.tokens_per_micro_batch` must be at least `rollout.max_model_len`: the longest trajectory has to fit")
def _micro_batch_holds_longest(config: Config, facts: Facts) -> Iterator[Finding]:
    tokens, longest = config.trainer.tokens_per_micro_batch, config.rollout.max_model_len
    if tokens < longest:
        yield Finding(
            f"{tokens} tokens for trajectories of up to {longest}",
            f"Set `trainer.tokens_per_micro_batch={longest}` or more, or lower `rollout.max_model_len`.",
        )


@rule("`trainer.record_steps` must name steps of the loop: 1 to `trainer.max_steps`")
def _recorded_steps_exist(config: Config, facts: Facts) -> Iterator[Finding]:
    last = config.trainer.max_steps
    outside = [step for step in config.trainer.record_steps if not 1 <= step <= last]
    if outside:
        yield Finding(
            f"{', '.join(map(str, outside))} of {last} steps",
            "Leave it out, or raise `trainer.max_steps` if it is still to come.",
        )


# ---- checkpoints ----------------------------------------------------------------------------------------------------------


@rule("`checkpoint.keep_best` goes by a metric of the steps that are saved; `eval/...` exists only where those are evaluated")
def _best_checkpoints_are_evaluated(config: Config, facts: Facts) -> Iterator[Finding]:
    saving, evaluation = config.checkpoint, config.evaluation
    if saving.keep_best == 0 or saving.interval_steps == 0 or not saving.best_metric.startswith("eval/"):
        return
    if evaluation.num_prompts == 0:
        yield Finding(
            f"`checkpoint.keep_best` is {saving.keep_best} by `{saving.best_metric}`, and `evaluation.num_prompts` is 0",
            "Set `evaluation.num_prompts=128`, or another `checkpoint.best_metric`, as reward/mean.",
        )
    elif evaluation.interval_steps == 0 or saving.interval_steps % evaluation.interval_steps:
        every = evaluation.interval_steps or config.trainer.max_steps
        yield Finding(
            f"saved every {saving.interval_steps} steps, evaluated every {every}: "
            "a checkpoint of a step that is not evaluated can't be the best",
            f"Set `evaluation.interval_steps={saving.interval_steps}`.",
            is_warning=True,
        )


# ---- lengths --------------------------------------------------------------------------------------------------------------


@rule("`rollout.max_new_tokens` must be smaller than `rollout.max_model_len`, which holds the prompt too")
def _prompt_has_room(config: Config, facts: Facts) -> Iterator[Finding]:
    new, longest = config.rollout.max_new_tokens, config.rollout.max_model_len
    if new >= longest:
        yield Finding(
            f"{new} new tokens in {longest}", f"Lower `rollout.max_new_tokens`, or set `rollout.max_model_len={2 * new}` or more."
        )


@rule("`rollout.max_model_len` must not exceed the positions the model knows (max_position_embeddings)")
def _positions_known(config: Config, facts: Facts) -> Iterator[Finding]:
    if facts.model is not None and config.rollout.max_model_len > facts.model.max_position_embeddings:
        known = facts.model.max_position_embeddings
        yield Finding(f"{config.rollout.max_model_len} for a model of {known}", f"Set `rollout.max_model_len={known}` or less.")


@rule(
    "`rollout.max_model_len` must not exceed the sliding window of a Qwen model that has one in some layers: vLLM can't serve it"
)
def _inside_sliding_window(config: Config, facts: Facts) -> Iterator[Finding]:
    window = facts.model.unserved_window if facts.model is not None else None
    if window is not None and config.rollout.max_model_len > window:
        yield Finding(
            f"{config.rollout.max_model_len} for a window of {window}", f"Set `rollout.max_model_len={window}` or less."
        )


@rule("The KV cache (`rollout.kv_cache_gib`, CPU) must hold at least one whole trajectory of `rollout.max_model_len` tokens")
def _cache_holds_a_trajectory(config: Config, facts: Facts) -> Iterator[Finding]:
    if facts.model is None or config.trainer.device == "cuda":
        return
    per_token = facts.model.kv_cache_bytes_per_token(_ELEMENT_BYTES[config.rollout.dtype])
    needed_gib = per_token * config.rollout.max_model_len / 2**30
    if needed_gib > config.rollout.kv_cache_gib:
        enough = int(needed_gib) + 1
        yield Finding(
            f"{config.rollout.max_model_len} tokens need {needed_gib:.2f} GiB and it has {config.rollout.kv_cache_gib}",
            f"Set `rollout.kv_cache_gib={enough}`, or lower `rollout.max_model_len`.",
            is_warning=config.trainer.device == "auto",  # on CUDA the setting has no effect
        )


# ---- numbers --------------------------------------------------------------------------------------------------------------


@rule("`rollout.dtype` must go with `model.dtype`: both bfloat16, or both float32")
def _precisions_pair(config: Config, facts: Facts) -> Iterator[Finding]:
    policy, engine = config.model.dtype, config.rollout.dtype
    if (policy, engine) == ("float32", "bfloat16"):
        yield Finding(
            "`model.dtype` is float32 and `rollout.dtype` is bfloat16: 93% of the updated weights would round back to their old"
            " bfloat16 value, so that the engine plays an older policy",
            "Choose `precision=float32` or `precision=bfloat16`.",
        )
    elif policy != engine:
        yield Finding(
            "`model.dtype` is bfloat16 and `rollout.dtype` is float32: the engine's logprobs will differ from the policy's by"
            " bfloat16 rounding, and sampling is slower for it",
            "Prefer `precision=bfloat16` or `precision=float32`.",
            is_warning=True,
        )


@rule("`rollout.top_p` = 1 and `rollout.top_k` = 0 are the cheap setting: truncated ratios need each position's cut")
def _truncation_costs_time(config: Config, facts: Facts) -> Iterator[Finding]:
    if config.rollout.top_p < 1 or config.rollout.top_k > 0:
        yield Finding(
            f"with `rollout.top_p` {config.rollout.top_p} and `rollout.top_k` {config.rollout.top_k} the trainer renormalises "
            "over the tokens that the sampler could draw, which computes the logits once more, in float32",
            "Keep it if truncation is meant; else `rollout.top_p=1.0 rollout.top_k=0`.",
            is_warning=True,
        )


@rule("`rollout.stop` strings are taken as they stand")
def _stop_strings_are_meant(config: Config, facts: Facts) -> Iterator[Finding]:
    if "" in config.rollout.stop:
        yield Finding("one of them is empty and would end every turn at once", "Leave it out.")
    for stop in config.rollout.stop:
        if "\\n" in stop or "\\t" in stop:
            yield Finding(
                f"{stop!r} holds a backslash and a letter, not a line break or tab",
                'Give it in a YAML file (`stop: ["\\n"]`), or as a real line break on the command line.',
                is_warning=True,
            )


# ---- task and device ------------------------------------------------------------------------------------------------------


@rule("`data.path` and `data.source` must agree: rows need a path, a generator reads none")
def _source_and_path_agree(config: Config, facts: Facts) -> Iterator[Finding]:
    data = config.data
    if data.source != "generator" and not data.path:
        yield Finding(
            f"`data.source` is {data.source} and `data.path` is empty", "Set `data.path=FILE`, or `data.source=generator`."
        )
    if data.source == "generator" and (data.path or data.eval_path):
        given = "data.path" if data.path else "data.eval_path"
        yield Finding(
            f"`data.source` is generator and `{given}` is `{data.path or data.eval_path}`, which would be ignored",
            "Set `data.source=jsonl` (or parquet, hf_dataset), or leave the path out.",
        )


@rule("`env.name=gsm8k` poses the rows of `data.path`; it generates none")
def _gsm8k_needs_rows(config: Config, facts: Facts) -> Iterator[Finding]:
    if config.env.name == "gsm8k" and config.data.source == "generator":
        yield Finding("`data.source` is generator", "Set `data.source=jsonl data.path=train.jsonl`, or choose `recipe=gsm8k`.")


@rule("`model.attention` must be one that `trainer.device` can run: flash and transformer_engine need cuda")
def _attention_fits_device(config: Config, facts: Facts) -> Iterator[Finding]:
    if config.trainer.device == "cpu" and config.model.attention in ("flash", "transformer_engine"):
        yield Finding(
            f"`model.attention` is {config.model.attention} and `trainer.device` is cpu", "Set `model.attention=sdpa` or auto."
        )


@rule("`model.attention=flash` needs `model.dtype=bfloat16`: flash-attn has no float32 kernels")
def _flash_is_bfloat16(config: Config, facts: Facts) -> Iterator[Finding]:
    if config.model.attention == "flash" and config.model.dtype != "bfloat16":
        yield Finding(f"`model.dtype` is {config.model.dtype}", "Set `model.attention=auto`, or choose `precision=bfloat16`.")


@rule("`model.kernels` must be a backend that `trainer.device` can run: cpu needs cpu, triton needs cuda")
def _kernels_fit_device(config: Config, facts: Facts) -> Iterator[Finding]:
    if (config.trainer.device, config.model.kernels) in (("cpu", "triton"), ("cuda", "cpu")):
        yield Finding(
            f"`model.kernels` is {config.model.kernels} and `trainer.device` is {config.trainer.device}",
            "Set `model.kernels=auto`.",
        )


@rule("`env.chat_template=true` needs a tokenizer with a chat template")
def _chat_template_exists(config: Config, facts: Facts) -> Iterator[Finding]:
    if config.env.chat_template and facts.model is not None and not facts.model.has_chat_template:
        yield Finding(f"`{facts.model.path}` has none", "Set `env.chat_template=false`, or use an instruction-tuned model.")
