"""What must exist around a run: data files, environments, packages, a place to write. Looks, and changes nothing.

The model's own files are read in `model_files.py`.
"""

from __future__ import annotations

import importlib.util
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path

from skyrl_mega.config.rule import Facts, Finding, RuleBook
from skyrl_mega.config.schema import Config
from skyrl_mega.config.settings import nearest
from skyrl_mega.config.teacher_files import teacher_problems

SURROUNDINGS = RuleBook()
rule = SURROUNDINGS.rule

ENVIRONMENTS = ("arithmetic", "reasoning_gym", "gsm8k")
#: Optional packages by what asks for them: (import name, extra that brings it).
TRACKER_PACKAGES = {
    "tensorboard": ("tensorboard", ""),
    "wandb": ("wandb", "[wandb]"),
    "mlflow": ("mlflow", "[mlflow]"),
}
ENVIRONMENT_PACKAGES = {"reasoning_gym": ("reasoning_gym", "[envs]")}
ATTENTION_PACKAGES = {"flash": ("flash_attn", "[cuda]"), "transformer_engine": ("transformer_engine", "[cuda]")}

_COMPLETE_CHECKPOINT = re.compile(r"step_\d+")
_CLASS_PATH = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")


def is_installed(name: str) -> bool:
    """Whether the top-level package can be imported, without importing it. A bare directory of that name does not count."""
    if name in sys.modules:
        return True
    spec = importlib.util.find_spec(name)
    return spec is not None and spec.origin is not None


def has_checkpoints(run_dir: Path, *, only_complete: bool) -> bool:
    """Whether `run_dir/checkpoints` holds a complete checkpoint (a directory `step_000012`), or anything at all."""
    pattern = _COMPLETE_CHECKPOINT if only_complete else re.compile(".*")
    directory = run_dir / "checkpoints"
    return directory.is_dir() and any(pattern.fullmatch(path.name) for path in directory.iterdir())


@rule("`env.name` must be a registered environment, or module:Class of your own")
def _environment_known(config: Config, facts: Facts) -> Iterator[Finding]:
    name = config.env.name
    if name in ENVIRONMENTS:
        return
    if not _CLASS_PATH.fullmatch(name):
        guess = nearest(name, ENVIRONMENTS)
        yield Finding(
            f"got `{name}`" + (f" (did you mean `{guess}`?)" if guess else ""),
            f"Registered: {', '.join(ENVIRONMENTS)}; your own is written `package.module:Class`.",
        )
        return
    package = name.partition(":")[0].partition(".")[0]
    if not is_installed(package) and importlib.util.find_spec(package) is None:
        yield Finding(
            f"got `{name}`, and no package `{package}` can be imported", "Install it, or add its directory to PYTHONPATH."
        )


@rule("The package behind a chosen environment or attention must be installed")
def _chosen_packages_installed(config: Config, facts: Facts) -> Iterator[Finding]:
    chosen = {
        "env.name": (config.env.name, ENVIRONMENT_PACKAGES),
        "model.attention": (config.model.attention, ATTENTION_PACKAGES),
    }
    for key, (value, packages) in chosen.items():
        package, extra = packages.get(value, ("", ""))
        if package and not is_installed(package):
            yield Finding(f"`{key}` is {value}, and `{package}` is not installed", f"Run `pip install 'skyrl-mega{extra}'`.")


@rule("`model.kernels` must be built or installed: cpu needs the C++ extension, triton the package")
def _kernels_are_there(config: Config, facts: Facts) -> Iterator[Finding]:
    if config.model.kernels == "cpu" and importlib.util.find_spec("skyrl_mega_kernels._C") is None:
        yield Finding(
            "`model.kernels` is cpu and `skyrl_mega_kernels._C` is not built", "Run `bash scripts/setup.sh`, or set it to auto."
        )
    if config.model.kernels == "triton" and not is_installed("triton"):
        yield Finding("`model.kernels` is triton and `triton` is not installed", "Run `pip install triton`, or set it to auto.")


@rule("`telemetry.trackers` must be known and installed")
def _trackers_usable(config: Config, facts: Facts) -> Iterator[Finding]:
    for name in config.telemetry.trackers:
        if name not in TRACKER_PACKAGES:
            yield Finding(
                f"got `{name}`",
                f"Known: {', '.join(TRACKER_PACKAGES)}; metrics.jsonl is always written (`telemetry.trackers=[]`).",
            )
            continue
        package, extra = TRACKER_PACKAGES[name]
        if not is_installed(package):
            what = f"'skyrl-mega{extra}'" if extra else package
            yield Finding(f"`{name}` is not installed", f"Run `pip install {what}`, or leave it out.")


@rule("`data.path` and `data.eval_path` must exist and be of the kind `data.source` names")
def _data_files_exist(config: Config, facts: Facts) -> Iterator[Finding]:
    source = config.data.source
    if source == "generator":
        return
    for key, text in (("data.path", config.data.path), ("data.eval_path", config.data.eval_path)):
        if not text:
            continue
        path = Path(text)
        if not path.exists():
            yield Finding(f"`{key}` is `{text}` and nothing is there (from `{Path.cwd()}`)", "Correct the path.")
        elif source == "hf_dataset" and not ((path / "state.json").is_file() or (path / "dataset_dict.json").is_file()):
            yield Finding(f"`{key}` is `{text}`, no directory that datasets wrote", "Write one with `dataset.save_to_disk(...)`.")
        elif source != "hf_dataset" and not path.is_file():
            yield Finding(f"`{key}` is `{text}`, a directory, and `data.source` is {source}", "Name the file, or use hf_dataset.")
        elif source != "hf_dataset" and path.stat().st_size == 0:
            yield Finding(f"`{key}` is `{text}`, an empty file", "Give a file with rows.")


@rule("`teacher.path` must be a model that can judge the policy's tokens")
def _teacher_fits_policy(config: Config, facts: Facts) -> Iterator[Finding]:
    if not config.teacher.path or facts.model is None:
        return
    for problem in teacher_problems(Path(config.teacher.path), facts.model, max_model_len=config.rollout.max_model_len):
        values, _, remedy = problem.rpartition(". ")
        yield Finding(values, remedy)


@rule("`warmup.path` must be a file of demonstrations, where `warmup.steps` > 0")
def _warmup_rows_exist(config: Config, facts: Facts) -> Iterator[Finding]:
    steps, path = config.warmup.steps, config.warmup.path
    if steps > 0 and not path:
        yield Finding(f"`warmup.steps` is {steps} and `warmup.path` is empty", "Set `warmup.path=FILE.jsonl`, or no steps.")
    elif steps > 0 and not Path(path).is_file():
        yield Finding(f"`warmup.path` is `{path}` and no file is there (from `{Path.cwd()}`)", "Correct the path.")
    elif steps == 0 and path:
        yield Finding(f"`warmup.path` is `{path}` and `warmup.steps` is 0, which trains nothing", "Set `warmup.steps=50`.")


@rule("`trainer.run_dir` must be a directory that can be written")
def _run_dir_writable(config: Config, facts: Facts) -> Iterator[Finding]:
    run_dir = Path(config.trainer.run_dir)
    nearest_existing = next(path for path in (run_dir.absolute(), *run_dir.absolute().parents) if path.exists())
    if not nearest_existing.is_dir():
        yield Finding(f"`{nearest_existing}` is a file", "Choose another `trainer.run_dir`.")
    elif not os.access(nearest_existing, os.W_OK | os.X_OK):
        yield Finding(
            f"`{nearest_existing}` can't be written by this user", "Choose another `trainer.run_dir`, or change its permissions."
        )


@rule("`checkpoint.resume` must fit the run directory: never needs an unused one, must needs a checkpoint")
def _resume_fits_run_dir(config: Config, facts: Facts) -> Iterator[Finding]:
    run_dir = Path(config.trainer.run_dir)
    if config.checkpoint.resume == "never" and has_checkpoints(run_dir, only_complete=False):
        yield Finding(
            f"resume is never and `{run_dir / 'checkpoints'}` is not empty",
            "Choose another `trainer.run_dir`, or continue the run with `checkpoint.resume=auto`.",
        )
    if config.checkpoint.resume == "must" and not has_checkpoints(run_dir, only_complete=True):
        yield Finding(
            f"resume is must and `{run_dir}` holds no complete checkpoint",
            "Correct `trainer.run_dir`, or start with `checkpoint.resume=auto`.",
        )
