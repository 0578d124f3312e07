"""Bad inputs, and what is said about each: the rule, the values that broke it, the remedy."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
from pathlib import Path

import pytest

from helpers.model_dir import write_model_dir
from skyrl_mega.config import surroundings
from skyrl_mega.config.load import load_config
from skyrl_mega.config.schema import Config
from skyrl_mega.config.settings import nearest
from skyrl_mega.config.validate import validate
from skyrl_mega.errors import ConfigError, SkyRLMegaError

ARITHMETIC = ("env.name=arithmetic", "env.chat_template=false")


@pytest.fixture
def model_dir(tmp_path: Path) -> Path:
    return write_model_dir(tmp_path / "model")


@pytest.fixture
def base(model_dir: Path, tmp_path: Path) -> list[str]:
    """Overrides of a configuration that breaks no rule."""
    return [f"model.path={model_dir}", f"trainer.run_dir={tmp_path / 'run'}", *ARITHMETIC]


def says(error: BaseException, *words: str) -> None:
    message = str(error)
    absent = [word for word in words if word not in message]
    assert not absent, f"{absent} not in:\n{message}"


# ---- loading --------------------------------------------------------------------------------------------------------------

BAD_OVERRIDES = {
    "misspelt key": (
        ["trainer.max_stps=3"],
        ["`trainer.max_stps` is not a setting", "did you mean `trainer.max_steps`?", "--print-config"],
    ),
    "misspelt section": (["optimiser.lr=1e-5"], ["`optimiser.lr` is not a setting", "`optimizer.lr`"]),
    "key of another section": (["trainer.lr=1e-5"], ["`trainer.lr` is not a setting", "`optimizer.lr`"]),
    "key of a nested section": (
        ["algorithm.kl.weight=1", "algorithm.kl_coef=1"],
        ["`algorithm.kl.weight`", "`algorithm.kl.coef`"],
    ),
    "key added with a plus": (["+rollout.max_tokens=9"], ["`rollout.max_tokens` is not a setting", "`rollout.max_new_tokens`"]),
    "key without a section": (["seed=3"], ["`seed` is not a setting", "`trainer.seed`"]),
    "key with nothing like it": (["zzz.qqq=3"], ["`zzz.qqq` is not a setting.", "docs/configuration.md"]),
    "unknown section given whole": (["foo={bar: {baz: 1}}"], ["`foo.bar.baz` is not a setting"]),
    "unknown option": (
        ["recipe=quikstart"],
        ["`recipe` must be one of ", "got `quikstart`", "`recipe=quickstart`?"],
    ),
    "option unlike any": (
        ["parallel=zzzzzz"],
        ["`parallel` must be one of cp2, cp2_tp2, dp2", "got `zzzzzz`", "Give one of these"],
    ),
    "unknown group": (
        ["recip=quickstart"],
        ["`recip` is not a group", "got `recip=quickstart`", "`recipe` ("],
    ),
    "section that is no group": (["data=jsonl"], ["`data` is a section, not a group", "got `data=jsonl`", "`data.name=value`"]),
    "group with a plus": (["+recipe=tiny"], ["without a plus", "got `+recipe=tiny`", "Write `recipe=tiny`"]),
    "word for an integer": (
        ["trainer.max_steps=abc"],
        ["`trainer.max_steps` must be an integer", "got 'abc' (a string)", "trainer.max_steps=100"],
    ),
    "fraction for an integer": (
        ["trainer.max_steps=1.5"],
        ["must be an integer", "got 1.5 (a float)", "`trainer.max_steps=1` or `trainer.max_steps=2`"],
    ),
    "boolean for an integer": (["trainer.threads=true"], ["`trainer.threads` must be an integer", "got True (a boolean)"]),
    "word for a number": (
        ["optimizer.lr=high"],
        ["`optimizer.lr` must be a number", "got 'high' (a string)", "optimizer.lr=1e-06"],
    ),
    "not a number": (["optimizer.lr=nan"], ["`optimizer.lr` must be a number", "got nan", "finite"]),
    "infinite integer": (["data.limit=inf"], ["`data.limit` must be an integer", "got inf", "finite"]),
    "integer for a boolean": (
        ["checkpoint.export_hf=1"],
        ["`checkpoint.export_hf` must be true or false", "got 1", "checkpoint.export_hf=true"],
    ),
    "number for text": (
        ["trainer.run_dir=42"],
        ["`trainer.run_dir` must be a string", "got 42 (an integer)", "Quote it", '"42"'],
    ),
    "null": (["trainer.run_dir=null"], ["`trainer.run_dir` must be a string", "got nothing (null)", "Leave it out"]),
    "text for a list": (
        ["telemetry.trackers=wandb"],
        ["must be a list of strings", "got 'wandb'", "`telemetry.trackers=[wandb]`"],
    ),
    "number in a list": (["rollout.stop=[a,3]"], ["`rollout.stop[1]` must be a string", "got 3", 'rollout.stop=["3"]']),
    "several values": (["rollout.stop=a,b"], ["gives one value", "`rollout.stop=a,b`", "`rollout.stop=[...]`"]),
    "number for a list": (["trainer.record_steps=812"], ["must be a list of integers", "`trainer.record_steps=[812]`"]),
    "text for a mapping": (
        ["env.options=easy"],
        ["`env.options` must be a mapping", "got 'easy'", "`env.options={name: value}`"],
    ),
    "number as an option's name": (["env.options={3: a}"], ["`env.options` must have strings as keys", "got 3", "Quote it"]),
    "text for a section": (["algorithm.kl=off"], ["`algorithm.kl` is a section", "`algorithm.kl.coef=...`"]),
    "mapping for text": (["model.path.name=x"], ["`model.path` must be a string", "(a mapping)", "`model.path=...`"]),
    "dtype by its short name": (
        ["model.dtype=bf16"],
        ["`model.dtype` must be one of bfloat16, float32", "got 'bf16'", "`model.dtype=bfloat16`?"],
    ),
    "choice unlike any": (
        ["algorithm.reduction=zzz"],
        ["must be one of token_mean, sequence_mean", "got 'zzz'", "Try `algorithm.reduction=token_mean`"],
    ),
    "number for a choice": (["checkpoint.resume=1"], ["must be one of auto, never, must", "got 1 (an integer)"]),
    "no equals sign": (["trainer.max_steps"], ["written key=value", "`trainer.max_steps` can't be read", "Quote"]),
    "unbalanced bracket": (["rollout.stop=[a"], ["written key=value", "`rollout.stop=[a` can't be read"]),
    "Hydra's own setting": (["hydra.run.dir=x"], ["Hydra's own settings have no effect", "`hydra.run.dir=x`", "trainer.run_dir"]),
    "dangling reference": (
        ["trainer.run_dir=${env.nam}"],
        ["`trainer.run_dir` must resolve", "'env.nam' not found", "Check the interpolation"],
    ),
    "deleting what is not set": (["~trainer.seeds"], ["must compose", "trainer.seeds", "Correct"]),
}


@pytest.mark.parametrize(("overrides", "words"), BAD_OVERRIDES.values(), ids=BAD_OVERRIDES)
def test_a_bad_override_is_explained(overrides, words):
    with pytest.raises(ConfigError) as caught:
        load_config(["model.path=m", "env.name=arithmetic", *overrides])
    says(caught.value, *words)


def test_what_is_required_is_asked_for():
    with pytest.raises(ConfigError) as caught:
        load_config([])
    says(caught.value, "`model.path` is required", "Set it with `model.path=...`", "`env.name` is required", "module:Class")


def test_all_bad_overrides_are_reported_together():
    with pytest.raises(ConfigError) as caught:
        load_config(["trainer.max_steps=abc", "optimizer.learning_rate=1", "model.dtype=fp8"])
    says(
        caught.value,
        "5 problems",
        "`trainer.max_steps` must",
        "`optimizer.learning_rate` is not",
        "`model.dtype` must",
        "`env.name` is required",
    )
    assert [f"{number}. " in str(caught.value) for number in range(1, 7)] == [True] * 5 + [False]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        (
            "exp.yaml",
            "defaults: [train, _self_]\ntrainer: {max_stepz: 3}\n",
            ["`trainer.max_stepz` is not a setting", "`trainer.max_steps`"],
        ),
        ("exp.yaml", "defaults: [train, _self_]\ntrainer: {max_steps: 3\n", ["must compose", "exp.yaml", "Correct the file"]),
        ("exp.yaml", "defaults: [train, _self_]\ntrainer: {seed: 1, seed: 2}\n", ["must compose", "duplicate key", "exp.yaml"]),
        ("exp.yaml", "defaults: [train, recipe: nope, _self_]\n", ["must compose", "recipe", "nope"]),
        ("exp.yaml", "defaults: [train, _self_]\ntrainer: 3\n", ["`trainer`", "section"]),
        ("other.yaml", "", ["must be one of other, train", "got `exp`", "--config-dir"]),
    ],
    ids=["unknown key", "bad YAML", "duplicate key", "unknown option", "scalar section", "no such file"],
)
def test_a_bad_file_is_explained(tmp_path, name, content, words):
    (tmp_path / name).write_text(content)
    with pytest.raises(ConfigError) as caught:
        load_config(["model.path=m", "env.name=arithmetic"], config_dir=tmp_path, config_name="exp")
    says(caught.value, *words)


def test_an_absent_config_dir_is_explained(tmp_path):
    with pytest.raises(ConfigError, match=r"must be an existing directory; got .*nowhere.* Create it"):
        load_config([], config_dir=tmp_path / "nowhere")


def test_nearest_prefers_the_same_last_word_and_gives_up_on_the_unlike():
    assert nearest("trainer.lr", ["trainer.max_steps", "optimizer.lr"]) == "optimizer.lr"
    assert nearest("model.dtyp", ["rollout.dtype", "model.dtype"]) == "model.dtype"
    assert nearest("xyzzy", ["model.path", "env.name"]) is None


# ---- validation -----------------------------------------------------------------------------------------------------------


def test_a_good_configuration_has_no_warnings(base):
    assert validate(load_config(base)) == []


BAD_COMBINATIONS = {
    "greedy samples": (["evaluation.samples_per_prompt=4"], 1, ["differ only at", "4 samples of each, greedily"]),
    "greedy samples of a task": (
        ["evaluation.tasks=[{name: a, env: {name: arithmetic}, samples_per_prompt: 8}]"],
        1,
        ["differ only at an `evaluation.temperature` above 0", "8 samples of each", "`evaluation.temperature=0.8`"],
    ),
    "tasks of one name": (
        ["evaluation.tasks=[{name: a, env: {name: x}}, {name: a, env: {name: x}}, {name: b/c, env: {name: x}}]"],
        1,
        ["have names of their own", "'a', 'b/c'", "eval/<name>/accuracy"],
    ),
    "a task out of range": (
        ["evaluation.tasks=[{name: a, env: {name: arithmetic, max_turns: 0}, num_prompts: -1}]"],
        1,
        ["num_prompts of a is -1", "in a, max_turns must be >= 1; got 0"],
    ),
    "a cold evaluation": (["evaluation.temperature=-1"], 1, ["`evaluation.temperature` must be >= 0", "got -1"]),
    "muon with cut matrices": (
        ["optimizer.name=muon", "critic.optimizer.name=muon"],
        1,
        ["Muon works on whole matrices", "`critic.optimizer.name` is muon", "Set `parallel.distributed_optimizer=false`"],
    ),
    "no step of Newton and Schulz": (["optimizer.muon.steps=0"], 1, ["`optimizer.muon.steps` must be >= 1", "got 0"]),
    "momentum for ever": (["optimizer.muon.momentum=1"], 1, ["`optimizer.muon.momentum` must be in [0, 1)", "got 1"]),
    "a warm-up longer than the run": (
        ["optimizer.schedule=cosine", "optimizer.warmup_updates=100", "trainer.max_steps=50"],
        1,
        ["`optimizer.schedule` is cosine", "100 updates of warm-up and at least 1 of decay, of 50", "`trainer.max_steps`"],
    ),
    "a decay longer than the schedule of the critic": (
        ["critic.optimizer.schedule=wsd", "critic.optimizer.decay_updates=30", "critic.optimizer.total_updates=20"],
        1,
        ["`critic.optimizer.schedule` is wsd", "30 of decay, of 20", "`critic.optimizer.decay_updates`"],
    ),
    "an exponential decay to nothing": (
        ["optimizer.schedule=wsd", "optimizer.wsd_decay=exponential"],
        1,
        ["exponentially to a floor above 0", "`optimizer.min_lr_ratio` is 0", "`optimizer.min_lr_ratio=0.01`"],
    ),
    "an end of a rate that has none": (
        ["optimizer.decay_updates=30", "optimizer.min_lr_ratio=0.1"],
        1,
        ["`optimizer.decay_updates` and `optimizer.min_lr_ratio` would change nothing", "`optimizer.schedule=cosine`"],
    ),
    "a floor above the rate": (["optimizer.min_lr_ratio=1.5"], 1, ["`optimizer.min_lr_ratio` must be in [0, 1]", "got 1.5"]),
    "a negative LoRA rank": (["lora.rank=-1"], 1, ["`lora.rank` must be >= 0", "got -1"]),
    "LoRA without a scale": (["lora.rank=8", "lora.alpha=0"], 1, ["`lora.alpha` must be > 0", "got 0"]),
    "an adapter to begin with and none to train": (
        ["lora.path=DIRECTORY"],
        1,
        ["`lora.path` needs `lora.rank` > 0", "`lora.rank` is 0", "leave the path out"],
    ),
    "a directory that is no adapter": (
        ["lora.rank=8", "lora.path=NOWHERE"],
        1,
        ["`lora.path` must be a PEFT adapter", "NOWHERE has no adapter_config.json"],
    ),
    "LoRA of nothing": (["lora.rank=8", "lora.targets=[]"], 1, ["`lora.targets` must name projections", "`lora.targets=[all]`"]),
    "an adapter for servers that have no room for it": (
        ["lora.rank=8", "lora.sync=adapter", "rollout.external_urls=[http://server]", "rollout.placement=ray"],
        1,
        ["`lora.sync=adapter` needs engines of the run's own", "`rollout.external_urls` names servers", "`lora.sync=auto`"],
    ),
    "a gather of adapters that is hidden": (
        ["lora.rank=8", "parallel.overlap_param_gather=true", "parallel.overlap_grad_reduce=true"],
        1,
        ["`parallel.overlap_param_gather` is for whole models", "`lora.rank` is 8", "`parallel.overlap_param_gather=false`"],
    ),
    "muon of factors": (
        ["lora.rank=8", "optimizer.name=muon", "parallel.distributed_optimizer=false"],
        1,
        ["`optimizer.name=muon` is for whole models", "`lora.rank` is 8", "`optimizer.name=adamw`"],
    ),
    "an adapter larger than vLLM takes": (
        ["lora.rank=1000", "lora.sync=adapter"],
        1,
        ["`lora.sync=adapter` needs", "`lora.rank` is 1000, and vLLM takes at most 512"],
    ),
    "a record of a step without an update": (
        ["critic.warmup_steps=3", "trainer.record_steps=[2,3,4]"],
        1,
        ["records updates of the policy", "2, 3 of 3 such steps", "later ones"],
    ),
    "8-bit engines of float32": (
        ["rollout.quantization=fp8", "precision=float32", "lora.rank=4"],
        1,
        ["`rollout.quantization=fp8` is for dense models", "`rollout.dtype` is float32", "Set `lora.sync=merged`"],
    ),
    "8-bit engines of others": (
        ["rollout.quantization=fp8", "rollout.external_urls=[http://host:1/v1]"],
        1,
        ["whose whole weights go to engines of ours", "Start the engines here"],
    ),
    "a critic that is only warmed up": (
        ["critic.warmup_steps=100"],
        1,
        ["`critic.warmup_steps` must leave steps to the policy", "100 of 100 steps", "raise `trainer.max_steps`"],
    ),
    "recorded steps beyond the last": (
        ["trainer.max_steps=100", "trainer.record_steps=[0,100,812]"],
        1,
        ["`trainer.record_steps` must name steps of the loop", "0, 812 of 100 steps", "raise `trainer.max_steps`"],
    ),
    "best checkpoints without evaluation": (
        ["checkpoint.keep_best=1", "evaluation.num_prompts=0"],
        1,
        ["`checkpoint.keep_best` goes by a metric", "`eval/accuracy`", "`evaluation.num_prompts` is 0", "reward/mean"],
    ),
    "negative keep_best": (["checkpoint.keep_best=-1"], 1, ["`checkpoint.keep_best` must be >= 0", "got -1"]),
    "pipeline": (
        ["parallel.pipeline=3"],
        3,
        [
            "`parallel.pipeline` x `parallel.virtual_pipeline` must divide the model's number of layers",
            "they are 3 and 1, and the model has 2 layers",
            "1, 2",
        ],
    ),
    "chunks of a pipeline": (
        ["parallel=pp2_vpp2"],
        2,
        ["must divide the model's number of layers", "they are 2 and 2, and the model has 2 layers", "1, 2"],
    ),
    "chunks without a pipeline": (
        ["parallel.virtual_pipeline=2"],
        1,
        ["needs `parallel.pipeline` > 1", "`parallel.virtual_pipeline` is 2", "parallel=pp2_vpp2"],
    ),
    "gather overlap alone": (
        ["parallel.overlap_param_gather=true"],
        2,
        ["needs `parallel.overlap_grad_reduce`", "they are false and true", "`parallel.overlap_param_gather=false`"],
    ),
    "tensor overlap alone": (
        ["parallel.overlap_tensor=true", "parallel.tensor=2"],
        2,
        ["needs `parallel.sequence_parallel`", "is false"],
    ),
    "recompute of nothing": (
        ["model.recompute=selective", "model.recompute_modules=[]"],
        1,
        ["must name some of core_attn, mlp and moe", "got []", "`model.recompute=none`"],
    ),
    "recompute of something else": (
        ["model.recompute=selective", "model.recompute_modules=[moe_act]"],
        1,
        ["must name some of core_attn, mlp and moe", "['moe_act']"],
    ),
    "layers to recompute without recomputing": (
        ["model.recompute_layers=1"],
        1,
        ["`model.recompute_layers` counts", "`model.recompute` is none"],
    ),
    "more layers to recompute than there are": (
        ["model.recompute=full", "model.recompute_layers=2", "parallel.pipeline=2"],
        2,
        ["`model.recompute_layers` counts", "2 of 1", "`model.recompute_layers=0`"],
    ),
    "more layers to offload than there are": (
        ["model.offload_layers=2", "parallel.pipeline=2"],
        2,
        ["at most the layers of a pipeline stage", "2 of 1", "`model.offload_layers=1` or less"],
    ),
    "offloading what is recomputed": (
        ["model.offload_layers=1", "model.recompute=full"],
        1,
        ["nothing to move where all is recomputed", "`model.recompute` is full", "`model.recompute=selective`"],
    ),
    "CUDA settings on CPU": (
        ["precision=fp8", "optimizer.offload=true", "model.offload_layers=1", "model.offload_frozen=true", "trainer.device=cpu"],
        1,
        [
            "are for CUDA",
            "`model.fp8` is set",
            "`optimizer.offload` is set",
            "`model.offload_layers` is set",
            "`model.offload_frozen` is set",
        ],
    ),
    "fp8 over float32": (
        ["model.fp8=delayed", "precision=float32"],
        1,
        ["`model.fp8` needs `model.dtype=bfloat16`", "`model.dtype` is float32", "`precision=fp8`"],
    ),
    "world size": (
        ["parallel.tensor=2"],
        3,
        ["divisible", "3 processes for 2 x 1 x 1 = 2", "data-parallel size", "--nproc-per-node 2"],
    ),
    "tensor against heads": (
        ["parallel.tensor=3"],
        3,
        ["must divide", "4 attention heads, 2 KV heads, 128 FFN size", "Sizes that fit this model: 1, 2."],
    ),
    "tensor against KV heads": (["parallel.tensor=4"], 4, ["must divide", "`parallel.tensor` is 4", "2 KV heads", "1, 2."]),
    "sequence parallel alone": (
        ["parallel.sequence_parallel=true"],
        1,
        ["needs `parallel.tensor` > 1", "`parallel.tensor` is 1", "parallel=tp2_sp"],
    ),
    "in process with ranks": (
        ["rollout.placement=in_process"],
        2,
        ["a single process", "processes=2", "`rollout.placement=auto`"],
    ),
    "updates against prompts": (
        ["trainer.updates_per_step=5"],
        1,
        ["must divide `trainer.prompts_per_step`", "32 prompts and 5 updates", "`trainer.updates_per_step=4`"],
    ),
    "group of one": (["trainer.samples_per_prompt=1"], 1, ["at least 2", "got 1", "`trainer.samples_per_prompt=8`"]),
    "attempt of the whole group": (
        ["algorithm.advantage=pass_at_k", "trainer.samples_per_prompt=4"],
        1,
        ["`algorithm.advantage_options.k` is 4 and `trainer.samples_per_prompt` is 4", "`trainer.samples_per_prompt=8`"],
    ),
    "target of no coefficient": (
        ["algorithm.kl.target=0.1"],
        1,
        ["begins at `algorithm.kl.coef`, which must be above 0", "`algorithm.kl.coef=0.05`"],
    ),
    "horizon shorter than a step": (
        [
            *("algorithm.kl.coef=0.1", "algorithm.kl.target=0.1", "algorithm.kl.horizon=7"),
            *("trainer.prompts_per_step=2", "trainer.samples_per_prompt=4"),
        ],
        1,
        ["at least the samples of a step", "it is 7 for 8 samples", "`algorithm.kl.horizon=800`"],
    ),
    "KL in rewards that gdpo does not see": (
        ["algorithm.advantage=gdpo", "algorithm.kl.coef=0.1", "algorithm.kl.place=reward"],
        1,
        ["not gdpo, and not maxrl", "which looks at the reward's parts only", "`algorithm.kl.place=loss`"],
    ),
    "too many ranks": (
        ["trainer.prompts_per_step=2", "trainer.samples_per_prompt=2"],
        8,
        [
            "a sequence in every update",
            "2 prompts x 2 samples / 1 updates = 4 sequences for a data-parallel size of 8",
            "fewer processes",
        ],
    ),
    "micro-batch too small": (
        ["trainer.tokens_per_micro_batch=512"],
        1,
        [
            "at least `rollout.max_model_len`",
            "512 tokens for trajectories of up to 1024",
            "`trainer.tokens_per_micro_batch=1024`",
        ],
    ),
    "in-process, asynchronous": (
        ["trainer.max_staleness=1", "rollout.placement=in_process"],
        1,
        ["in turns", "got trainer.max_staleness=1", "`rollout.placement=auto`"],
    ),
    "a fleet in a child process": (
        ["rollout.num_engines=2", "rollout.placement=child_process"],
        1,
        ["need `rollout.placement=ray`", "got rollout.num_engines=2"],
    ),
    "no engine": (["rollout.num_engines=0"], 1, ["no engine at all", "`rollout.external_urls`"]),
    "transport": (
        ["rollout.weight_transport=nccl", "trainer.device=cpu"],
        1,
        ["must fit the device", "nccl on cpu", "one GPU", "`rollout.weight_transport=auto`"],
    ),
    "delta": (
        ["rollout.weight_delta=true", "rollout.weight_transport=cuda_ipc"],
        1,
        ["in host memory", "cuda_ipc", "`rollout.weight_transport=gloo`"],
    ),
    "no room for a prompt": (
        ["rollout.max_new_tokens=1024"],
        1,
        ["smaller than `rollout.max_model_len`", "1024 new tokens in 1024", "`rollout.max_model_len=2048`"],
    ),
    "unknown positions": (
        ["rollout.max_model_len=4000"],
        1,
        ["max_position_embeddings", "4000 for a model of 2048", "`rollout.max_model_len=2048` or less"],
    ),
    "precision": (
        ["precision=float32", "rollout.dtype=bfloat16"],
        1,
        ["must go with `model.dtype`", "93%", "`precision=float32`"],
    ),
    "temperature": (
        ["rollout.temperature=0"],
        1,
        ["`rollout.temperature` must be > 0", "got 0.0", "default is 1.0", "evaluation"],
    ),
    "top_p": (["rollout.top_p=1.2"], 1, ["`rollout.top_p` must be in (0, 1]", "got 1.2", "default is 1.0"]),
    "top_k": (["rollout.top_k=-1"], 1, ["`rollout.top_k` must be >= 0", "got -1"]),
    "entropy_coef": (["algorithm.entropy_coef=-1"], 1, ["`algorithm.entropy_coef` must be >= 0", "got -1.0", "default is 0.0"]),
    "lr": (["optimizer.lr=0"], 1, ["`optimizer.lr` must be > 0", "got 0.0", "1e-06"]),
    "beta1": (["optimizer.beta1=1"], 1, ["`optimizer.beta1` must be in [0, 1)", "got 1.0", "default is 0.9"]),
    "eps": (["optimizer.eps=0"], 1, ["`optimizer.eps` must be > 0", "got 0.0"]),
    "clip_grad_norm": (["optimizer.clip_grad_norm=-1"], 1, ["`optimizer.clip_grad_norm` must be >= 0", "got -1.0"]),
    "kl": (["algorithm.kl.coef=-0.1"], 1, ["`algorithm.kl.coef` must be >= 0", "got -0.1"]),
    "threads": (["trainer.threads=0"], 1, ["`trainer.threads` must be >= 1", "got 0"]),
    "intervals": (
        ["evaluation.interval_steps=-1", "checkpoint.interval_steps=-2"],
        1,
        ["`evaluation.interval_steps` must be >= 0; got -1", "`checkpoint.interval_steps` must be >= 0; got -2"],
    ),
    "keep_last": (["checkpoint.keep_last=0"], 1, ["`checkpoint.keep_last` must be >= 1", "got 0", "default is 2"]),
    "probe tolerance": (["rollout.probe_tolerance=-1"], 1, ["`rollout.probe_tolerance` must be >= 0", "got -1.0"]),
    "cache of nothing": (["rollout.kv_cache_gib=0"], 1, ["`rollout.kv_cache_gib` must be >= 1", "got 0"]),
    "zero tensor size": (["parallel.tensor=0"], 1, ["`parallel.tensor` must be >= 1", "got 0"]),
    "zero updates": (["trainer.updates_per_step=0"], 1, ["`trainer.updates_per_step` must be >= 1", "got 0"]),
    "empty stop": (['rollout.stop=["a",""]'], 1, ["`rollout.stop`", "empty", "Leave it out"]),
    "dynamic sampling of one": (
        ["sampling.dynamic=true", "trainer.samples_per_prompt=1"],
        1,
        ["`sampling.dynamic` compares", "got 1", "`sampling.dynamic=false`"],
    ),
    "curriculum without an end": (
        ["sampling.curriculum=success"],
        1,
        ["needs prompts that come again", "no prompt twice", "`data.limit=1000`"],
    ),
    "one bound": (["sampling.reward.clip=[1]"], 1, ["two bounds", "got [1.0]", "`sampling.reward.clip=[0,1]`"]),
    "bounds upside down": (["sampling.reward.clip=[1,0]"], 1, ["low < high", "got [1.0, 0.0]"]),
    "penalty of a whole turn": (
        ["sampling.overlong.penalty_tokens=256"],
        1,
        ["`sampling.overlong.penalty_tokens` must be less than", "256 of 256", "`sampling.overlong.penalty_tokens=51`"],
    ),
    "replay without correction": (
        ["sampling.replay.share=0.25"],
        1,
        ["older policies sampled", "share` is 0.25 and there is no stage", "off_policy.stages=[{name: truncated_is}]"],
    ),
    "zeros that are moved": (
        ["sampling.zero_variance=drop", "algorithm.normalize_advantages=true"],
        1,
        ["advantages of exactly 0", "both are set", "`sampling.zero_variance=keep`"],
    ),
    "replays of uneven updates": (
        ["sampling.replay.share=0.1", "trainer.updates_per_step=2", "algorithm.off_policy.stages=[{name: icepop}]"],
        1,
        ["whole number of groups", "0.1 x 32 = 3.2 groups for 2 updates", "`sampling.replay.share=0.125`"],
    ),
    "rows without a path": (
        ["data.source=jsonl"],
        1,
        ["must agree", "`data.source` is jsonl and `data.path` is empty", "`data.path=FILE`"],
    ),
    "path without rows": (["data.path=x.jsonl"], 1, ["must agree", "`x.jsonl`, which would be ignored", "data.source=jsonl"]),
    "gsm8k from nothing": (
        ["env.name=gsm8k", "data.source=generator"],
        1,
        ["poses the rows of `data.path`", "generator", "recipe=gsm8k"],
    ),
    "absent rows": (["data.source=jsonl", "data.path=nowhere.jsonl"], 1, ["must exist", "`nowhere.jsonl`", "Correct the path"]),
    "directory for jsonl": (
        ["data.source=jsonl", "data.path=."],
        1,
        ["must exist and be of the kind", "a directory", "hf_dataset"],
    ),
    "not a dataset": (
        ["data.source=hf_dataset", "data.path=."],
        1,
        ["of the kind", "no directory that datasets wrote", "save_to_disk"],
    ),
    "unknown environment": (
        ["env.name=arithmetics"],
        1,
        ["must be a registered environment", "got `arithmetics`", "did you mean `arithmetic`?", "module:Class"],
    ),
    "environment of no package": (
        ["env.name=no_such_package_here.envs:Mine"],
        1,
        ["no package `no_such_package_here`", "PYTHONPATH"],
    ),
    "unknown tracker": (
        ["telemetry.trackers=[tensorbord]"],
        1,
        ["must be known and installed", "got `tensorbord`", "tensorboard, wandb, mlflow"],
    ),
    "flash on cpu": (
        ["model.attention=flash", "trainer.device=cpu"],
        1,
        ["need cuda", "`model.attention` is flash", "model.attention=sdpa"],
    ),
    "flash in float32": (
        ["model.attention=flash", "precision=float32"],
        1,
        ["no float32 kernels", "`model.dtype` is float32", "`precision=bfloat16`"],
    ),
    "kernels for another device": (
        ["model.kernels=triton", "trainer.device=cpu"],
        1,
        ["`model.kernels` must be a backend", "`model.kernels` is triton and `trainer.device` is cpu", "`model.kernels=auto`"],
    ),
    "must without checkpoint": (
        ["checkpoint.resume=must"],
        1,
        ["must needs a checkpoint", "holds no complete checkpoint", "checkpoint.resume=auto"],
    ),
}


@pytest.mark.parametrize(("overrides", "world_size", "words"), BAD_COMBINATIONS.values(), ids=BAD_COMBINATIONS)
def test_a_bad_combination_is_explained(base, overrides, world_size, words):
    config = load_config([*base, *overrides])
    with pytest.raises(ConfigError) as caught:
        validate(config, world_size=world_size)
    says(caught.value, *words)


BAD_CRITICS = {
    "heads": (
        {"num_attention_heads": 3, "num_key_value_heads": 1, "num_hidden_layers": 5, "intermediate_size": 99},
        ["parallel=tp2_pp2"],
        [
            "The critic's layout must fit its model",
            "`critic.parallel.tensor` is 2 and the model has 3 attention heads, 1 KV heads, 99 FFN size",
            "`critic.parallel.pipeline` x `critic.parallel.virtual_pipeline` must divide",
            "they are 2 and 1, and the model has 5 layers. Products that fit this model: 1, 5. (0 there is the policy's.)",
        ],
    ),
    "a layout of its own": (
        {},
        ["parallel=tp2_pp2", "critic.parallel.pipeline=1", "critic.parallel.virtual_pipeline=2", "critic.parallel.tensor=8"],
        ["`critic.parallel.virtual_pipeline` is 2 and `critic.parallel.pipeline` is 1", "4 processes for 8 x 1 x 1 = 8"],
    ),
    "sequence parallel": (
        {},
        ["critic.parallel.tensor=1", "critic.parallel.sequence_parallel=on"],
        ["`critic.parallel.sequence_parallel` is true and `critic.parallel.tensor` is 1"],
    ),
    "positions": ({"max_position_embeddings": 64}, [], ["it knows 64 of 1024 positions", "`rollout.max_model_len=64`"]),
    "family": ({"model_type": "gpt2"}, [], ["The model's family must be one of llama", "`gpt2`"]),
}


@pytest.mark.parametrize(("changes", "overrides", "words"), BAD_CRITICS.values(), ids=BAD_CRITICS)
def test_a_critic_that_does_not_fit_is_explained(base, tmp_path, changes, overrides, words):
    path = write_model_dir(tmp_path / "critic", **changes)
    (path / "tokenizer.json").unlink()  # a critic needs none
    config = load_config([*base, f"critic.path={path}", *overrides])
    with pytest.raises(ConfigError) as caught:
        validate(config, world_size=4)
    says(caught.value, *words)
    assert "tokenizer" not in str(caught.value)


def test_a_critic_of_another_vocabulary_is_a_warning(base, tmp_path):
    path = write_model_dir(tmp_path / "critic", vocab_size=280)
    warnings = validate(load_config([*base, f"critic.path={path}"]))
    assert any("280 entries, the policy's 272" in warning for warning in warnings), warnings


def test_an_absent_critic_is_named_by_its_setting(base, tmp_path):
    with pytest.raises(
        ConfigError, match=r"`critic\.path` must be the directory of a Hugging Face model; got .*nothing is there"
    ):
        validate(load_config([*base, f"critic.path={tmp_path / 'absent'}"]))


def test_all_broken_rules_are_reported_together(base):
    config = load_config(
        [*base, "parallel.tensor=0", "trainer.samples_per_prompt=1", "data.source=jsonl", "rollout.num_engines=0"]
    )
    with pytest.raises(ConfigError) as caught:
        validate(config)
    says(
        caught.value,
        "4 problems",
        "`parallel.tensor` must be >= 1",
        "at least 2",
        "`data.path` is empty",
        "there is no engine at all",
    )
    assert isinstance(caught.value, SkyRLMegaError)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["rollout.dtype=float32"], ["must go with", "differ from the policy's", "Prefer `precision=bfloat16`"]),
        (["rollout.top_p=0.9"], ["`rollout.top_p` 0.9", "renormalises over the tokens", "rollout.top_p=1.0 rollout.top_k=0"]),
        (["rollout.top_k=50"], ["`rollout.top_k` 50", "renormalises over the tokens"]),
        ([r'rollout.stop=["\n"]'], ["as they stand", "a backslash and a letter", "real line break"]),
        (
            ["checkpoint.keep_best=1", "checkpoint.interval_steps=6", "evaluation.interval_steps=4"],
            ["saved every 6 steps, evaluated every 4", "can't be the best", "Set `evaluation.interval_steps=6`"],
        ),
        (
            ["algorithm.policy_loss=gspo"],
            ["sequence_mean` is the objective of gspo", "gspo with token_mean", "`algorithm.reduction=sequence_mean`"],
        ),
    ],
    ids=["engine float32", "top_p", "top_k", "backslash", "best not evaluated", "gspo over tokens"],
)
def test_a_doubtful_combination_is_warned_about(base, overrides, words):
    warnings = validate(load_config([*base, *overrides]))
    assert len(warnings) == 1
    says(ConfigError(warnings[0]), *words)


@pytest.mark.parametrize(
    ("overrides", "world_size"),
    [
        ([], 2),
        (["parallel=tp2"], 2),
        (["parallel=tp2_sp"], 4),
        (["precision=float32"], 1),
        (["rollout.max_model_len=2048"], 1),
        (["rollout.placement=in_process"], 1),
        (["trainer.prompts_per_step=2", "trainer.samples_per_prompt=4"], 8),
        (["trainer.updates_per_step=32"], 1),
        (["trainer.tokens_per_micro_batch=1024"], 1),
        (["optimizer.beta2=0", "optimizer.clip_grad_norm=0", "algorithm.kl.coef=0.1"], 1),
        (["rollout.top_p=1.0", "evaluation.num_prompts=0", "checkpoint.interval_steps=0"], 1),
        (["env.name=helpers.model_dir:Anything"], 1),
        (["telemetry.trackers=[]"], 1),
        (["trainer.max_steps=8", "trainer.record_steps=[1,8]"], 1),
        (["checkpoint.keep_best=2", "checkpoint.interval_steps=6", "evaluation.interval_steps=3"], 1),
        (["sampling.overlong.penalty_tokens=255", "sampling.reward.clip=[0,1]", "sampling.dynamic=true"], 1),
        (["sampling.curriculum=success", "data.limit=100"], 1),
        (["sampling.replay.share=0.125", "trainer.updates_per_step=4", "algorithm.off_policy.stages=[{name: truncated_is}]"], 1),
        (["checkpoint.keep_best=2", "checkpoint.best_metric=reward/mean", "evaluation.num_prompts=0"], 1),
        (["algorithm.policy_loss=gspo", "algorithm.reduction=sequence_mean"], 1),
        (["rollout=async", "algorithm.policy_loss=dppo_tv", "algorithm.off_policy.stages=[]"], 1),
    ],
)
def test_the_edge_of_a_rule_is_allowed(base, overrides, world_size):
    assert validate(load_config([*base, *overrides]), world_size=world_size) == []


def test_no_process_at_all_is_refused(base):
    with pytest.raises(ConfigError, match=r"at least 1; got 0.*WORLD_SIZE"):
        validate(load_config(base), world_size=0)


def test_without_files_nothing_on_disk_is_looked_at():
    config = load_config(
        ["model.path=/nowhere", "env.name=gsm8k", "data.source=jsonl", "data.path=/nowhere.jsonl", "telemetry.trackers=[?]"]
    )
    assert validate(config, check_files=False) == []
    with pytest.raises(ConfigError, match="/nowhere"):
        validate(config)


# ---- mixtures of experts --------------------------------------------------------------------------------------------------

_SIGMOID = {"n_routed_experts": 8, "moe_intermediate_size": 48, "n_shared_experts": 2, "first_k_dense_replace": 1}
GLM4_MOE = {"model_type": "glm4_moe", **_SIGMOID}
_LATENT = {"kv_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16}
DEEPSEEK_V3 = {"model_type": "deepseek_v3", **_SIGMOID, **_LATENT}
QWEN3_MOE = {"model_type": "qwen3_moe", "num_experts": 6, "moe_intermediate_size": 48, "intermediate_size": 127}
QWEN2_MOE = {**QWEN3_MOE, "model_type": "qwen2_moe", "shared_expert_intermediate_size": 81}
BAD_EXPERT_LAYOUTS = {
    "experts": (
        QWEN3_MOE,
        ["parallel.expert=4"],
        4,
        ["number and FFN size", "`parallel.expert` is 4 and the model has 6 experts", "Sizes that fit this model: 1, 2, 3, 6."],
    ),
    "experts, newer spelling": (
        {**QWEN3_MOE, "num_experts": None, "num_local_experts": 6},
        ["parallel.expert=4"],
        4,
        ["the model has 6 experts"],
    ),
    "dense model": (
        {},
        ["parallel.expert=2"],
        2,
        ["need a mixture of experts", "`parallel.expert` is 2", "the model (`llama`) is dense", "Set both to 1"],
    ),
    "dense model, split experts": ({}, ["parallel.expert_tensor=2"], 2, ["`parallel.expert_tensor` is 2", "is dense"]),
    "expert tensor on CPU": (
        QWEN3_MOE,
        ["parallel=tp2_sp", "parallel.expert_tensor=2", "trainer.device=cpu"],
        2,
        ["`parallel.expert_tensor` must be 1", "gloo", "`parallel.expert_tensor` is 2", "raise `parallel.expert`"],
    ),
    "expert tensor of its own size": (
        QWEN3_MOE,
        ["parallel.expert_tensor=2", "trainer.device=cuda"],
        2,
        ["equal to `parallel.tensor` on CUDA", "`parallel.tensor` is 1"],
    ),
    "expert tensor against FFN": (
        {**QWEN3_MOE, "moe_intermediate_size": 49},
        ["parallel=tp2_sp", "parallel.expert_tensor=2", "trainer.device=cuda"],
        2,
        ["FFN size they divide", "`parallel.expert_tensor` is 2 and the experts' FFN size is 49"],
    ),
    "world size": (
        QWEN3_MOE,
        ["parallel.expert=2", "parallel.pipeline=2"],
        2,
        ["`parallel.expert` x `parallel.expert_tensor` x `parallel.pipeline`", "2 processes for 2 x 1 x 2 = 4", "Start 4"],
    ),
    "8-bit engines": (
        QWEN3_MOE,
        ["rollout.quantization=fp8"],
        1,
        ["`rollout.quantization=fp8` is for dense models", "the model (`qwen3_moe`) is a mixture of experts"],
    ),
    "tensor without sequence parallel": (
        QWEN3_MOE,
        ["parallel.tensor=2"],
        2,
        ["needs `parallel.sequence_parallel`", "the model is `qwen3_moe`", "`parallel.sequence_parallel=true`", "ep2_tp2"],
    ),
    "tensor against a shared expert": (QWEN2_MOE, ["parallel=tp2_sp"], 2, ["81 shared expert's FFN size"]),
    "tensor against dense layers": (
        {**QWEN3_MOE, "mlp_only_layers": [1]},
        ["parallel=tp2_sp"],
        2,
        ["`parallel.tensor` is 2 and the model has 127 FFN size"],
    ),
    "balancing a dense model": ({}, ["model.moe_aux_loss_coef=0.01"], 1, ["`model.moe_aux_loss_coef` is 0.01", "is dense"]),
    "small logits of a dense model": ({}, ["model.moe_z_loss_coef=0.01"], 1, ["`model.moe_z_loss_coef` is 0.01", "is dense"]),
    "a frozen router of a dense model": ({}, ["model.freeze_router=true"], 1, ["`model.freeze_router` is True", "is dense"]),
    "a frozen router with losses": (
        QWEN3_MOE,
        ["model.freeze_router=true", "model.moe_z_loss_coef=0.01"],
        1,
        ["goes without losses of the router", "`model.moe_z_loss_coef` is 0.01", "Set both to 0"],
    ),
    "replay in a dense model": ({}, ["model.router_replay=rollout"], 1, ["it is rollout and the model (`llama`) is dense"]),
    "replay of a server's routing": (
        QWEN3_MOE,
        ["model.router_replay=rollout", "rollout.external_urls=[http://a:8000]", "rollout.placement=ray"],
        1,
        ["not a server of somebody else", "http://a:8000", "`model.router_replay=old`"],
    ),
    "engine in stages on CPU": (
        {},
        ["trainer.device=cpu", "rollout.engine_pipeline=2"],
        1,
        ["need cuda", "`rollout.engine_pipeline` is 2 and `trainer.device` is cpu", "`rollout.engine_tensor` divides"],
    ),
    "data parallel engine on CPU": (
        {},
        ["trainer.device=cpu", "rollout.engine_data=2"],
        1,
        ["need cuda", "`rollout.engine_data` is 2 and `trainer.device` is cpu", "`rollout.num_engines` adds"],
    ),
    "replay of an engine in stages": (
        QWEN3_MOE,
        ["model.router_replay=rollout", "rollout.engine_pipeline=2"],
        1,
        ["not one in pipeline stages", "`rollout.engine_pipeline` is 2"],
    ),
    "replay of a pass that is not made": (
        QWEN3_MOE,
        ["model.router_replay=old"],
        1,
        ["replays the pass of `algorithm.old_logprobs=policy`", "`trainer.updates_per_step` is 1"],
    ),
    "negative z loss": ({}, ["model.moe_z_loss_coef=-1"], 1, ["`model.moe_z_loss_coef` must be >= 0", "got -1.0"]),
    "moving biases of a softmax router": (
        QWEN3_MOE,
        ["model.moe_bias_update_rate=0.001"],
        1,
        ["`model.moe_bias_update_rate` > 0 needs routers", "it is 0.001 and the model is `qwen3_moe`"],
    ),
    "moving biases of frozen routers": (
        GLM4_MOE,
        ["model.moe_bias_update_rate=0.001", "model.freeze_router=true"],
        1,
        ["`model.moe_bias_update_rate` > 0 needs routers that are trained", "`model.freeze_router` is true"],
    ),
    "moving biases backwards": (GLM4_MOE, ["model.moe_bias_update_rate=-1"], 1, ["`model.moe_bias_update_rate` must be >= 0"]),
    "tensor against latent heads": (
        {**DEEPSEEK_V3, "num_key_value_heads": 2, "num_attention_heads": 3},
        ["parallel=tp2_sp"],
        2,
        ["`parallel.tensor` is 2 and the model has 3 attention heads, 3 KV heads"],
    ),
    "negative balance": ({}, ["model.moe_aux_loss_coef=-1"], 1, ["`model.moe_aux_loss_coef` must be >= 0", "got -1.0"]),
}


@pytest.mark.parametrize("case", BAD_EXPERT_LAYOUTS)
def test_a_layout_that_experts_do_not_fit_is_refused(case, tmp_path):
    changes, overrides, world_size, words = BAD_EXPERT_LAYOUTS[case]
    path = write_model_dir(tmp_path / "model", **changes)
    config = load_config([f"model.path={path}", f"trainer.run_dir={tmp_path / 'run'}", *ARITHMETIC, *overrides])
    with pytest.raises(ConfigError) as caught:
        validate(config, world_size=world_size)
    says(caught.value, *words)


@pytest.mark.parametrize(
    ("changes", "overrides", "world_size"),
    [
        (QWEN3_MOE, ["parallel=ep2"], 2),
        (QWEN3_MOE, ["parallel=ep2_tp2"], 2),
        (QWEN3_MOE, ["parallel=ep2", "parallel.pipeline=2"], 4),
        (QWEN3_MOE, ["parallel.expert=6", "model.moe_aux_loss_coef=0.01"], 6),
        (QWEN3_MOE, ["parallel=tp2_sp", "parallel.expert_tensor=2", "trainer.device=cuda"], 2),
        ({"model_type": "mixtral", "num_local_experts": 8}, ["parallel=ep2_tp2"], 4),
        (GLM4_MOE, ["parallel=ep2_tp2", "model.moe_bias_update_rate=0.001"], 2),
        (DEEPSEEK_V3, ["parallel.expert=8", "model.moe_bias_update_rate=0.001"], 8),
    ],
)
def test_a_layout_that_experts_fit_is_allowed(changes, overrides, world_size, tmp_path):
    path = write_model_dir(tmp_path / "model", **changes)
    config = load_config([f"model.path={path}", f"trainer.run_dir={tmp_path / 'run'}", *ARITHMETIC, *overrides])
    assert validate(config, world_size=world_size) == []


# ---- the model's files ----------------------------------------------------------------------------------------------------


def _drop(name):
    return lambda path: (path / name).unlink()


def _write(name, text):
    return lambda path: (path / name).write_text(text)


BAD_MODELS = {
    "no config": ({}, [_drop("config.json")], ["must hold config.json", "whole Hugging Face model directory"]),
    "config not JSON": ({}, [_write("config.json", "{")], ["config.json` must be JSON", "Copy the model directory again"]),
    "config a list": ({}, [_write("config.json", "[]")], ["must be one of llama, mistral, qwen2", "`None`"]),
    "other family": ({"model_type": "gpt2"}, [], ["family must be one of llama, mistral, qwen2", "`gpt2`", "Choose a model"]),
    "no experts": ({"model_type": "mixtral"}, [], ["must give num_local_experts", "Copy"]),
    "no expert size": ({**QWEN3_MOE, "moe_intermediate_size": None}, [], ["must give moe_intermediate_size"]),
    "no heads": ({"num_attention_heads": None}, [], ["must give num_attention_heads", "Copy"]),
    "quantised": ({"quantization_config": {"bits": 4}}, [], ["floating point", "quantised", "original weights"]),
    "no weights": ({}, [_drop("model.safetensors")], ["*.safetensors", "no weight file", "save_pretrained"]),
    "other weights": ({}, [_drop("model.safetensors"), _write("pytorch_model.bin", "")], ["only pytorch_model.bin", "Convert"]),
    "shard absent": (
        {},
        [_write("model.safetensors.index.json", json.dumps({"weight_map": {"a": "one.safetensors", "b": "model.safetensors"}}))],
        ["Every weight file", "1 of 2 are not", "`one.safetensors`", "Finish the download"],
    ),
    "index broken": ({}, [_write("model.safetensors.index.json", "[]")], ["weight_map", "can't be read", "Copy"]),
    "converted": ({}, [_drop("model.safetensors"), _write(".metadata", "")], ["a Megatron checkpoint", "skyrl-mega convert /"]),
    "a checkpoint": (
        {},
        [_drop("config.json"), _write(".metadata", "")],
        ["a Megatron checkpoint", "MODEL_DIRECTORY --model DIRECTORY_WITH_ITS_CONFIG"],
    ),
    "a run": (
        {},
        [_drop("config.json"), _write("config.yaml", ""), lambda path: (path / "checkpoints").mkdir()],
        ["a run. Run `skyrl-mega export --run /", "and set `model.path` to that"],
    ),
    "no tokenizer": (
        {},
        [_drop("tokenizer.json")],
        ["must hold the tokenizer", "tokenizer.json, tokenizer.model", "Copy the model's tokenizer"],
    ),
}


@pytest.mark.parametrize(("changes", "damages", "words"), BAD_MODELS.values(), ids=BAD_MODELS)
def test_a_bad_model_directory_is_explained(tmp_path, changes, damages, words):
    path = write_model_dir(tmp_path / "model", **changes)
    for damage in damages:
        damage(path)
    with pytest.raises(ConfigError) as caught:
        validate(load_config([f"model.path={path}", f"trainer.run_dir={tmp_path / 'run'}", *ARITHMETIC]))
    says(caught.value, str(path), *words)


def test_an_absent_model_directory_is_explained(base, tmp_path):
    with pytest.raises(ConfigError) as caught:
        validate(load_config([*base, "model.path=Someone/Some-Model"]))
    says(caught.value, "must be the directory", "`Someone/Some-Model` (nothing is there)", "prepare_smollm2.py")
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"\(a file\)"):
        validate(load_config([*base, f"model.path={tmp_path / 'file'}"]))


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_a_model_as_transformers_writes_it_is_accepted(tmp_path, family):
    from helpers.tiny import write_tiny_model

    path = write_tiny_model(tmp_path / family, family)
    overrides = [f"model.path={path}", f"trainer.run_dir={tmp_path / 'run'}", "recipe=tiny", "env.chat_template=true"]
    assert validate(load_config(overrides)) == []


def test_all_weight_shards_present_is_accepted(base, model_dir):
    (model_dir / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "model.safetensors"}}))
    assert validate(load_config(base)) == []


def test_a_chat_template_is_needed_where_it_is_used(tmp_path):
    path = write_model_dir(tmp_path / "model", chat_template=False)
    overrides = [f"model.path={path}", f"trainer.run_dir={tmp_path / 'run'}", "env.name=arithmetic"]
    with pytest.raises(
        ConfigError, match=r"needs a tokenizer with a chat template; .* has none\. Set `env\.chat_template=false`"
    ):
        validate(load_config(overrides))
    assert validate(load_config([*overrides, "env.chat_template=false"])) == []
    (path / "chat_template.jinja").write_text("x")
    assert validate(load_config(overrides)) == []


@pytest.mark.parametrize(("served", "settings"), [
    (False, {"model_type": "qwen2", "use_sliding_window": True, "max_window_layers": 1}),
    (False, {"model_type": "qwen3", "use_sliding_window": True, "layer_types": ["full_attention", "sliding_attention"]}),
    (True, {"model_type": "qwen2", "use_sliding_window": True, "max_window_layers": 0}),
    (True, {"model_type": "qwen2", "use_sliding_window": True}),  # from layer 28 on: in none
    (True, {"model_type": "qwen2"}),
    (True, {"model_type": "mistral"}),
])  # fmt: skip
def test_a_window_that_vllm_cannot_serve_bounds_the_length(served, settings, tmp_path):
    path = write_model_dir(tmp_path / "model", sliding_window=512, num_hidden_layers=2, **settings)
    overrides = [f"model.path={path}", f"trainer.run_dir={tmp_path / 'run'}", *ARITHMETIC]
    if not served:
        with pytest.raises(ConfigError, match=r"sliding window.*1024 for a window of 512.*`rollout\.max_model_len=512`"):
            validate(load_config(overrides))
        overrides.append("rollout.max_model_len=512")
    assert validate(load_config(overrides)) == []


def test_the_cache_must_hold_one_trajectory_on_cpu(tmp_path):
    # 2 x 64 layers x 8 heads x 128 x 2 bytes = 262,144 bytes a token: 4096 tokens fill 1 GiB exactly.
    path = write_model_dir(
        tmp_path / "model",
        num_hidden_layers=64,
        num_attention_heads=8,
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=9000,
    )
    overrides = [f"model.path={path}", f"trainer.run_dir={tmp_path / 'run'}", *ARITHMETIC, "trainer.tokens_per_micro_batch=9000"]
    fits, too_long = "rollout.max_model_len=4096", "rollout.max_model_len=4097"
    assert validate(load_config([*overrides, fits, "trainer.device=cpu"])) == []
    with pytest.raises(ConfigError, match=r"KV cache.*4097 tokens need 1\.00 GiB and it has 1\. Set `rollout\.kv_cache_gib=2`"):
        validate(load_config([*overrides, too_long, "trainer.device=cpu"]))
    assert len(validate(load_config([*overrides, too_long]))) == 1  # auto may mean cuda, where the setting has no effect
    assert validate(load_config([*overrides, too_long, "trainer.device=cuda"])) == []


# ---- around the run -------------------------------------------------------------------------------------------------------


def test_a_used_run_directory_is_refused_when_resuming_is_off(base, tmp_path):
    never = load_config([*base, "checkpoint.resume=never"])
    assert validate(never) == []
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    assert validate(never) == []  # an empty directory holds nothing to lose
    (tmp_path / "run" / "checkpoints" / "step_000012.tmp").mkdir()
    with pytest.raises(ConfigError, match=r"never needs an unused one.*checkpoints` is not empty.*checkpoint\.resume=auto"):
        validate(never)
    must = load_config([*base, "checkpoint.resume=must"])
    with pytest.raises(ConfigError, match="no complete checkpoint"):
        validate(must)
    (tmp_path / "run" / "checkpoints" / "step_000012").mkdir()
    assert validate(must) == []


def test_a_run_directory_that_can_not_be_written_is_refused(base, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"can be written; .*file` is a file\. Choose another"):
        validate(load_config([*base, f"trainer.run_dir={tmp_path / 'file' / 'run'}"]))
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)  # root may write anywhere
    with pytest.raises(ConfigError, match="can't be written by this user"):
        validate(load_config([*base, f"trainer.run_dir={tmp_path / 'new' / 'run'}"]))


def test_prompt_files_are_looked_at(base, tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text("")
    overrides = [*base, "data.source=jsonl", f"data.path={rows}"]
    with pytest.raises(ConfigError, match="an empty file"):
        validate(load_config(overrides))
    rows.write_text("{}\n")
    assert validate(load_config(overrides)) == []
    with pytest.raises(ConfigError, match=r"`data\.eval_path` is `nowhere`"):
        validate(load_config([*overrides, "data.eval_path=nowhere"]))
    (tmp_path / "dataset").mkdir()
    (tmp_path / "dataset" / "state.json").write_text("{}")
    assert validate(load_config([*base, "data.source=hf_dataset", f"data.path={tmp_path / 'dataset'}"])) == []


@pytest.mark.parametrize(
    ("overrides", "package", "words"),
    [
        (["telemetry.trackers=[wandb]"], "wandb", ["`wandb` is not installed", "pip install 'skyrl-mega[wandb]'"]),
        (["telemetry.trackers=[mlflow]"], "mlflow", ["`mlflow` is not installed", "pip install 'skyrl-mega[mlflow]'"]),
        (["env.name=reasoning_gym"], "reasoning_gym", ["`env.name` is reasoning_gym", "pip install 'skyrl-mega[envs]'"]),
        (["model.attention=flash"], "flash_attn", ["`model.attention` is flash", "pip install 'skyrl-mega[cuda]'"]),
    ],
)
def test_an_absent_package_is_named_with_its_command(base, monkeypatch, overrides, package, words):
    config = load_config([*base, *overrides])
    monkeypatch.setattr(surroundings, "is_installed", lambda name: name != package)
    with pytest.raises(ConfigError) as caught:
        validate(config)
    says(caught.value, *words)
    monkeypatch.setattr(surroundings, "is_installed", lambda name: True)
    assert validate(config) == []


def test_a_bare_directory_is_no_installed_package(tmp_path, monkeypatch):
    """wandb leaves a directory named wandb where it ran; from there it must not look installed."""
    (tmp_path / "some_tracker").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    assert importlib.util.find_spec("some_tracker") is not None
    assert not surroundings.is_installed("some_tracker")
    (tmp_path / "some_tracker" / "__init__.py").write_text("raise RuntimeError('must not be imported')")
    importlib.invalidate_caches()
    assert surroundings.is_installed("some_tracker")
    assert surroundings.is_installed("json")


def test_a_configuration_without_a_model_is_refused_by_validation_too(tmp_path):
    config = dataclasses.replace(Config(), trainer=dataclasses.replace(Config().trainer, run_dir=str(tmp_path / "run")))
    with pytest.raises(ConfigError) as caught:
        validate(config)
    says(caught.value, "2 problems", "`model.path` must be the directory", "`env.name` must be a registered environment")
