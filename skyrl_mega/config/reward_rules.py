"""Rules of the reward section: what its terms must say, and what must exist for them.

What needs a look inside (a function's signature, whether a server answers) is for `rewards/check.py`, at the start of a run and
in the doctor's report.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

from skyrl_mega.config.placement import resolve_placement
from skyrl_mega.config.ranges import Range
from skyrl_mega.config.rule import Facts, Finding, RuleBook
from skyrl_mega.config.schema import Config, FunctionTerm, JudgeTerm, ModelTerm
from skyrl_mega.config.settings import nearest

REWARD_COMBINATIONS = RuleBook()
REWARD_SURROUNDINGS = RuleBook()

#: The environment's own reward among a trajectory's scores.
ENV_SCORE = "env"
PLACEHOLDERS = ("prompt", "response", "reference")
PLACEHOLDER = re.compile(r"\{([A-Za-z_]\w*)\}")

_NAME = re.compile(r"[A-Za-z]\w*")
_MODULE = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*")
_RANGES: dict[str, Range] = {
    "timeout_s": Range(0, is_low_open=True),
    "retries": Range(0),
    "tokens_per_batch": Range(1),
    "output": Range(-1),
    "max_tokens": Range(1),
    "concurrency": Range(1),
    "cache_size": Range(0),
}


def function_place(path: str) -> tuple[str, str]:
    """(module or file, function's name) of `module:function` or `file.py:function`; the second is "" where it is neither."""
    where, _, name = path.rpartition(":")
    is_place = where.endswith(".py") or _MODULE.fullmatch(where) is not None
    return (where, name) if is_place and name.isidentifier() else (path, "")


def api_key_variables(config: Config) -> list[str]:
    """The environment variables that the judges' API keys are in."""
    return [term.api_key_env for term in config.reward.terms if isinstance(term, JudgeTerm) and term.api_key_env]


@REWARD_COMBINATIONS.rule(
    "`reward.terms` must have names that are unique words, and numbers in their ranges; `env` names the environment's reward"
)
def _names_and_numbers(config: Config, facts: Facts) -> Iterator[Finding]:
    names = [term.name for term in config.reward.terms]
    for index, term in enumerate(config.reward.terms):
        if not _NAME.fullmatch(term.name) or term.name == ENV_SCORE:
            yield Finding(f"term {index} is named {term.name!r}", "Choose a name of letters, digits and underscores.")
        elif term.name in names[:index]:
            yield Finding(f"terms {names.index(term.name)} and {index} are both named `{term.name}`", "Rename one of them.")
        for key, allowed in _RANGES.items():
            if hasattr(term, key) and getattr(term, key) not in allowed:
                yield Finding(f"`{key}` of `{term.name}` is {getattr(term, key)}", f"Give a number {allowed}.")


@REWARD_COMBINATIONS.rule("`reward.env_weight` and the weights of `reward.terms` must not all be 0: nothing would be learned")
def _something_is_rewarded(config: Config, facts: Facts) -> Iterator[Finding]:
    reward = config.reward
    if reward.env_weight == 0 and all(term.weight == 0 for term in reward.terms):
        yield Finding(f"`reward.env_weight` is 0 and so are the weights of {len(reward.terms)} terms", "Give one a weight.")


@REWARD_COMBINATIONS.rule("The `path` of a function in `reward.terms` must be module:function or file.py:function")
def _functions_are_named(config: Config, facts: Facts) -> Iterator[Finding]:
    for term in config.reward.terms:
        if isinstance(term, FunctionTerm) and not function_place(term.path)[1]:
            yield Finding(f"that of `{term.name}` is `{term.path}`", "Write it as in `my_rewards.py:brevity`.")


@REWARD_COMBINATIONS.rule("A `url` in `reward.terms` must begin with http:// or https:// and name a host")
def _urls_are_urls(config: Config, facts: Facts) -> Iterator[Finding]:
    for term in config.reward.terms:
        url = getattr(term, "url", "")
        parts = urlsplit(url)
        if url and (parts.scheme not in ("http", "https") or not parts.netloc):
            yield Finding(f"that of `{term.name}` is `{url}`", "Write it as in `http://127.0.0.1:8000/v1`.")


@REWARD_COMBINATIONS.rule(
    "A judge's `template` must have {response} and no placeholders but {prompt}, {response} and {reference}, which needs"
    " `reference`"
)
def _templates_are_filled(config: Config, facts: Facts) -> Iterator[Finding]:
    for term in config.reward.terms:
        if not isinstance(term, JudgeTerm):
            continue
        found = PLACEHOLDER.findall(term.template)
        for name in dict.fromkeys(found):
            if name not in PLACEHOLDERS:
                guess = nearest(name, PLACEHOLDERS)
                yield Finding(
                    f"that of `{term.name}` has {{{name}}}",
                    f"Did you mean {{{guess}}}?" if guess else "Take it out, or write it without braces.",
                )
        if "response" not in found:
            yield Finding(f"that of `{term.name}` lacks {{response}}", "Say where the response goes.")
        if "reference" in found and not term.reference:
            yield Finding(
                f"that of `{term.name}` has {{reference}} and `reference` is empty",
                "Name the payload's key, as in `reference: answer`.",
            )
        if term.reference and "reference" not in found:
            yield Finding(f"`reference` of `{term.name}` is `{term.reference}`, unused", "Add {reference}, or leave it out.")


@REWARD_COMBINATIONS.rule("A judge's `pattern` must be a regular expression with one group, and `min_score` below `max_score`")
def _scores_can_be_read(config: Config, facts: Facts) -> Iterator[Finding]:
    for term in config.reward.terms:
        if not isinstance(term, JudgeTerm):
            continue
        if term.min_score >= term.max_score:
            yield Finding(f"those of `{term.name}` are {term.min_score:g} and {term.max_score:g}", "Exchange or mend them.")
        if term.extract == "regex":
            try:
                groups = re.compile(term.pattern).groups
            except re.error as error:
                yield Finding(f"that of `{term.name}` is `{term.pattern}`: {error}", "Mend it.")
                continue
            if groups != 1:
                found = f"that of `{term.name}` is `{term.pattern}`, with {groups} groups"
                yield Finding(found, "Mark the score, as in `Score: (\\d+)`.")


@REWARD_COMBINATIONS.rule(
    "A reward model with `device: cuda` must be loaded where the coordinator sees a GPU; that of a fleet sees none"
)
def _models_see_their_device(config: Config, facts: Facts) -> Iterator[Finding]:
    for term in config.reward.terms:
        if not isinstance(term, ModelTerm) or term.url or term.device != "cuda":
            continue
        if resolve_placement(config, facts.world_size) == "ray":
            yield Finding(
                f"`{term.name}` is to be on cuda, and the coordinator is a Ray actor without GPUs",
                "Serve the model with vLLM and give its `url`, or set `device: cpu`.",
            )


@REWARD_SURROUNDINGS.rule("The functions of `reward.terms` must be in a file that exists, or in a package that can be imported")
def _functions_exist(config: Config, facts: Facts) -> Iterator[Finding]:
    for term in config.reward.terms:
        if not isinstance(term, FunctionTerm):
            continue
        where, name = function_place(term.path)
        if not name:
            continue
        if where.endswith(".py"):
            if not Path(where).is_file():
                yield Finding(f"`{term.name}` is in `{where}` and no file is there (from `{Path.cwd()}`)", "Correct the path.")
        elif importlib.util.find_spec(where.partition(".")[0]) is None:
            package = where.partition(".")[0]
            yield Finding(
                f"`{term.name}` is in `{where}`, and no package `{package}` can be imported",
                "Install it, or add its directory to PYTHONPATH.",
            )


@REWARD_SURROUNDINGS.rule(
    "The models of `reward.terms` must be directories of sequence-classification models with their tokenizer"
)
def _models_exist(config: Config, facts: Facts) -> Iterator[Finding]:
    for term in config.reward.terms:
        if isinstance(term, ModelTerm):
            yield from _model_findings(term, config.rollout.max_model_len)


def _model_findings(term: ModelTerm, max_model_len: int) -> Iterator[Finding]:
    directory = Path(term.path)
    try:
        settings = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        yield Finding(f"that of `{term.name}` is `{term.path}`, whose config.json can't be read ({error})", "Correct its `path`.")
        return
    architectures = settings.get("architectures") or ["none"]
    if not architectures[0].endswith("ForSequenceClassification"):
        yield Finding(
            f"`{term.path}` of `{term.name}` holds the architecture {architectures[0]}, which has no score",
            "Give a reward model's directory; for a chat model as judge, use `kind: judge`.",
        )
    if not (directory / "tokenizer_config.json").is_file():
        yield Finding(f"`{term.path}` of `{term.name}` has no tokenizer_config.json", "Copy the tokenizer's files there.")
    if not term.url and not any(directory.glob("*.safetensors")) and not any(directory.glob("*.bin")):
        yield Finding(f"`{term.path}` of `{term.name}` holds no weights", "Copy them there, or give the `url` of a server.")
    positions = settings.get("max_position_embeddings")
    if isinstance(positions, int) and positions < max_model_len:
        yield Finding(
            f"`{term.name}` knows {positions} positions and trajectories have up to {max_model_len}: it can't score the longest",
            "Lower `rollout.max_model_len`, or set its `on_error`.",
            is_warning=True,
        )


@REWARD_SURROUNDINGS.rule("The environment variable that `api_key_env` of a judge names must be set")
def _api_keys_are_set(config: Config, facts: Facts) -> Iterator[Finding]:
    for name in api_key_variables(config):
        if not os.environ.get(name):
            yield Finding(f"`{name}` is not", f"Run `export {name}=...` first.")
