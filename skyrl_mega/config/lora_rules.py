"""The rules of the `lora` section, and what its `sync` comes to."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from skyrl_mega.config.lora_files import read_adapter_config
from skyrl_mega.config.model_files import ModelFiles, inspect_model
from skyrl_mega.config.rule import Facts, Finding, RuleBook
from skyrl_mega.config.schema import Config
from skyrl_mega.errors import ModelLoadError

LORA_COMBINATIONS = RuleBook()
LORA_SURROUNDINGS = RuleBook()

#: The ranks that vLLM makes room for; an adapter takes the next one.
ENGINE_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)


def syncs_adapter(config: Config) -> bool:
    """Whether engines get the adapter alone, as `lora.sync` says or chooses by the model's files; else whole weights."""
    if config.lora.rank == 0 or config.lora.sync == "merged":
        return False
    if config.lora.sync == "adapter":
        return True
    model, _ = inspect_model(Path(config.model.path))
    return not _why_not_alone(config, model)


def engine_rank(config: Config) -> int:
    """The rank of adapters that engines make room for; 0: they get whole weights."""
    if not syncs_adapter(config):
        return 0
    return next(rank for rank in ENGINE_RANKS if rank >= config.lora.rank)


def _why_not_alone(config: Config, model: ModelFiles | None) -> str:
    """Why engines can't take the adapter alone; "" if they can."""
    if config.rollout.external_urls:
        return "`rollout.external_urls` names servers that were started without room for adapters"
    if model is not None and model.experts is not None and config.lora.experts:
        return "the model has experts, whose adapters vLLM can't add everywhere, and `lora.experts` is true"
    if model is not None and model.latent_size:
        return "the model has multi-latent attention, which vLLM computes with copies of its projections, without adapters"
    if config.lora.rank > ENGINE_RANKS[-1]:
        return f"`lora.rank` is {config.lora.rank}, and vLLM takes at most {ENGINE_RANKS[-1]}"
    return ""


@LORA_COMBINATIONS.rule(
    "`lora.sync=adapter` needs engines of the run's own, no adapters on experts, no latent attention, and a rank that vLLM has"
)
def _engines_take_the_adapter(config: Config, facts: Facts) -> Iterator[Finding]:
    if config.lora.rank > 0 and config.lora.sync == "adapter" and (why := _why_not_alone(config, facts.model)):
        yield Finding(why, "Set `lora.sync=auto`, which merges the adapter into the weights that engines get.")


@LORA_COMBINATIONS.rule("`lora.path` needs `lora.rank` > 0: with rank 0 the whole model is trained")
def _an_adapter_to_begin_with_is_trained(config: Config, facts: Facts) -> Iterator[Finding]:
    if config.lora.path and config.lora.rank == 0:
        yield Finding("`lora.rank` is 0", "Set `lora.rank` (and `lora.alpha`) to the adapter's, or leave the path out.")


@LORA_COMBINATIONS.rule("`lora.targets` must name projections, or be [all]")
def _something_has_an_adapter(config: Config, facts: Facts) -> Iterator[Finding]:
    if config.lora.rank > 0 and not config.lora.targets:
        yield Finding("it is empty", "Set `lora.targets=[all]`.")


@LORA_COMBINATIONS.rule("`parallel.overlap_param_gather` is for whole models: gathering an adapter takes no time worth hiding")
def _no_gather_of_adapters_is_hidden(config: Config, facts: Facts) -> Iterator[Finding]:
    if config.lora.rank > 0 and config.parallel.overlap_param_gather:
        yield Finding(f"`lora.rank` is {config.lora.rank}", "Set `parallel.overlap_param_gather=false`.")


@LORA_COMBINATIONS.rule("`optimizer.name=muon` is for whole models: it makes a weight's update orthogonal, not a factor's")
def _muon_is_for_whole_models(config: Config, facts: Facts) -> Iterator[Finding]:
    if config.lora.rank > 0 and config.optimizer.name == "muon":
        yield Finding(f"`lora.rank` is {config.lora.rank}", "Set `optimizer.name=adamw`.")


@LORA_SURROUNDINGS.rule("`lora.path` must be a PEFT adapter that the `lora` section describes")
def _the_adapter_fits(config: Config, facts: Facts) -> Iterator[Finding]:
    if config.lora.path and config.lora.rank > 0:
        try:
            read_adapter_config(Path(config.lora.path)).require(config.lora)
        except ModelLoadError as error:
            yield Finding(str(error).rstrip("."), "Correct `lora.path` or the settings.")
