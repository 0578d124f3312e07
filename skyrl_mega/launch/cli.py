"""The command line: `skyrl-mega COMMAND`. Answers `--help` without importing anything heavy.

Exit codes: 0 done, 1 the doctor found what prevents a run, a checkpoint is damaged, a ledger does not add up, or a replay, a
layout or a conversion differs from what it is compared with, 2 an error whose message says the remedy, 130 interrupted (Ctrl-C),
143 terminated.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from skyrl_mega import __version__
from skyrl_mega.errors import ConfigError, SkyRLMegaError
from skyrl_mega.launch.interrupt import SIGINT_CODE, SIGTERM_CODE, Terminated, how_to_go_on, terminable
from skyrl_mega.launch.quiet import quiet_libraries

if TYPE_CHECKING:
    from skyrl_mega.config.schema import Config

_OVERRIDES_HELP = "group=option or section.key=value, as in: recipe=gsm8k trainer.max_steps=50"
_TRAIN_EPILOG = """examples:
  skyrl-mega train recipe=quickstart
  skyrl-mega train recipe=gsm8k data.path=train.jsonl model.path=MODEL_DIRECTORY
  skyrl-mega train recipe=quickstart trainer.max_steps=10 --print-config
  torchrun --nproc-per-node 2 -m skyrl_mega.train recipe=quickstart parallel=dp2

All settings, groups and recipes: docs/configuration.md."""
_ROWS_EPILOGS = {
    "sft": """examples:
  skyrl-mega sft model.path=MODEL_DIRECTORY data.path=conversations.jsonl
  skyrl-mega sft model.path=MODEL_DIRECTORY 'data.datasets=[{path: a.jsonl, weight: 2}, {path: b.parquet, weight: 1}]'
  torchrun --nproc-per-node 2 -m skyrl_mega sft parallel=tp2 model.path=MODEL_DIRECTORY data.path=conversations.jsonl

Rows: {"messages": [...]}, {"prompt", "response"}, {"text"} or {"input_ids", "loss_mask"}; docs/training_modes.md.""",
    "dpo": """examples:
  skyrl-mega dpo model.path=MODEL_DIRECTORY data.path=pairs.jsonl
  skyrl-mega dpo model.path=MODEL_DIRECTORY data.path=pairs.jsonl preference.loss=simpo preference.beta=2 preference.margin=1
  skyrl-mega dpo model.path=MODEL_DIRECTORY data.path=labels.jsonl preference.loss=kto

Rows: {"prompt", "chosen", "rejected"}, for kto {"prompt", "response", "label"}; docs/training_modes.md.""",
    "rm": """examples:
  skyrl-mega rm model.path=MODEL_DIRECTORY data.path=pairs.jsonl
  skyrl-mega rm model.path=MODEL_DIRECTORY data.path=scores.jsonl reward_model.loss=regression

Rows: {"prompt", "chosen", "rejected"}, or {"prompt", "response", "score"}; docs/training_modes.md.""",
}
_DISTILL_EPILOG = """examples:
  skyrl-mega distill recipe=quickstart teacher.path=TEACHER_DIRECTORY
  skyrl-mega distill recipe=quickstart teacher.path=TEACHER_DIRECTORY teacher.topk=32

Everything else is as in `skyrl-mega train`. docs/howto/distill.md explains the two ways."""
_EVAL_EPILOG = """examples:
  skyrl-mega eval recipe=quickstart                        the model as it came
  skyrl-mega eval recipe=quickstart --checkpoint latest    the newest checkpoint of trainer.run_dir
  skyrl-mega eval recipe=quickstart evaluation.samples_per_prompt=8 evaluation.temperature=0.8      pass@k, majority vote

Further tasks, intervals, and the files it writes: docs/howto/evaluate.md."""
_EXPORT_EPILOG = """examples:
  skyrl-mega export --run runs/quickstart --output my-model
  skyrl-mega export --run runs/quickstart --checkpoint best --output my-model"""
_CONVERT_EPILOG = """examples:
  skyrl-mega convert SmolLM2-135M my-checkpoint
  skyrl-mega convert runs/quickstart/checkpoints/step_000026 my-model --check-logprobs
  torchrun --nproc-per-node 2 -m skyrl_mega convert MODEL my-checkpoint parallel=tp2

Exit code 1: a tensor of the result is not what the source holds. What is compared, and where: docs/howto/convert.md."""
_CHECKPOINTS_EPILOG = """examples:
  skyrl-mega checkpoints runs/quickstart
  skyrl-mega checkpoints runs/quickstart --verify checksums    reads every file

Exit code 1: a checkpoint is damaged. What is kept, and how to choose: docs/howto/checkpoints.md."""
_LEDGER_EPILOG = """examples:
  skyrl-mega ledger runs/quickstart
  skyrl-mega ledger runs/quickstart --json
  skyrl-mega ledger runs/quickstart --group 812    the life of one group

Also beside a run that goes on. Exit code 1: the audit found something. docs/howto/ledger.md explains every check."""
_TRACE_EPILOG = """examples:
  skyrl-mega trace runs/quickstart                    writes runs/quickstart/trace_all.json
  skyrl-mega trace runs/quickstart --output all.json

For a run with telemetry.trace=true, also while it goes on. Open the file in ui.perfetto.dev or chrome://tracing."""
_REPLAY_EPILOG = """examples:
  skyrl-mega replay runs/quickstart 812
  skyrl-mega replay runs/quickstart 812 precision=float32 trainer.device=cpu
  torchrun --nproc-per-node 2 -m skyrl_mega replay runs/quickstart 812 parallel=tp2

Exit code 0: the replay agrees with the record (also that the step fails). How to record: docs/howto/replay_a_step.md."""
_VERIFY_EPILOG = """examples:
  skyrl-mega verify-layout recipe=gsm8k data.path=train.jsonl parallel=tp2_pp2 --world-size 8
  skyrl-mega verify-layout recipe=gsm8k model.path=MODEL parallel.tensor=8 parallel.pipeline=4 --world-size 512 --max-ranks 4

Runs on CPU with a small random model of the same architecture; every axis that the layout splits is split in two. Exit code 0:
losses, logprobs of every token, gradient norms and updated weights equal those of one process. docs/parallelism.md has more."""
_DOCTOR_EPILOG = """examples:
  skyrl-mega doctor
  skyrl-mega doctor recipe=quickstart trainer.device=cuda    can this machine run that?"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code. `argv` is without the program's name; None: the process's own."""
    arguments = _parse(sys.argv[1:] if argv is None else list(argv))
    command: Callable[[argparse.Namespace], int] = arguments.command
    quiet_libraries()
    try:
        with terminable():
            return command(arguments)
    except SkyRLMegaError as error:
        if arguments.traceback:
            raise
        _report(error)
        return 2
    except KeyboardInterrupt as stop:
        was_terminated = isinstance(stop, Terminated)
        said = "".join(f"; {text}" for text in stop.args)
        _say(f"{'terminated' if was_terminated else 'interrupted'}{said}")
        return SIGTERM_CODE if was_terminated else SIGINT_CODE


def _parse(argv: list[str]) -> argparse.Namespace:
    """argparse, with overrides allowed before and after the options."""
    parser = _parser()
    arguments, rest = parser.parse_known_args(argv)
    strays = [text for text in rest if text.startswith("-")]
    if strays or (rest and "overrides" not in arguments):
        parser.error(f"unrecognized arguments: {' '.join(strays or rest)}")
    if rest:
        arguments.overrides = [*arguments.overrides, *rest]
    return arguments


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="skyrl-mega",
        description="Reinforcement learning for language models: Megatron-Core policies and vLLM rollouts.",
        epilog="`skyrl-mega COMMAND --help` has examples.",
    )
    parser.add_argument("--version", action="version", version=f"skyrl-mega {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(name: str, run: Callable[[argparse.Namespace], int], summary: str, epilog: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(
            name, help=summary, description=summary, epilog=epilog, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        sub.set_defaults(command=run)
        sub.add_argument("--traceback", action="store_true", help="show where an error was raised")
        return sub

    train = add("train", _train, "Train a policy.", _TRAIN_EPILOG)
    _add_config_arguments(train)
    train.add_argument("--print-config", action="store_true", help="print every setting, resolved, as YAML and end")

    distill = add("distill", _distill, "Train a policy on what a teacher says of its answers.", _DISTILL_EPILOG)
    _add_config_arguments(distill)
    distill.add_argument("--print-config", action="store_true", help="print every setting, resolved, as YAML and end")

    for name, summary in (
        ("sft", "Fine-tune on conversations or responses."),
        ("dpo", "Train a policy on preferences (DPO, IPO, SimPO, ORPO, KTO ...)."),
        ("rm", "Train a reward model on preferences or scores."),
    ):
        on_rows = add(name, _on_rows, summary, _ROWS_EPILOGS[name])
        on_rows.set_defaults(mode=name)
        _add_config_arguments(on_rows, config_name=name)
        on_rows.add_argument("--print-config", action="store_true", help="print every setting, resolved, as YAML and end")

    evaluate = add("eval", _eval, "Accuracy, pass@k and majority vote on held-out prompts.", _EVAL_EPILOG)
    _add_config_arguments(evaluate)
    evaluate.add_argument(
        "--checkpoint", metavar="DIR|STEP|latest|best", help="weights to evaluate; without it, those of model.path"
    )
    evaluate.add_argument("--num-prompts", type=int, metavar="N", help="same as evaluation.num_prompts=N")
    evaluate.add_argument(
        "--output", type=Path, metavar="DIR", help="default: evaluations/NAME of model or checkpoint, in the run"
    )

    export = add("export", _export, "Write a checkpoint as a Hugging Face model directory.", _EXPORT_EPILOG)
    export.add_argument("--run", required=True, type=Path, metavar="DIR", help="the run's directory")
    export.add_argument(
        "--checkpoint", default="latest", metavar="DIR|STEP|latest|best", help="which checkpoint; default: %(default)s"
    )
    export.add_argument("--output", required=True, type=Path, metavar="DIR", help="where the model directory is written")

    convert = add("convert", _convert, "Hugging Face weights to a Megatron checkpoint or back, with proof.", _CONVERT_EPILOG)
    convert.add_argument("source", type=Path, metavar="SOURCE", help="a Hugging Face directory, or a checkpoint's directory")
    convert.add_argument("output", type=Path, metavar="OUTPUT", help="a directory that does not exist")
    convert.add_argument("overrides", nargs="*", metavar="OVERRIDE", help="the layout, under torchrun, as in: parallel=tp2")
    convert.add_argument(
        "--model", type=Path, metavar="DIR", help="config.json and tokenizer of a checkpoint that lies in no run"
    )
    convert.add_argument(
        "--dtype", choices=("auto", "bfloat16", "float32"), default="auto", help="of the result; default: as the source"
    )
    convert.add_argument("--check-logprobs", action="store_true", help="compare a few logprobs with Hugging Face's, in float32")
    convert.add_argument("--details", action="store_true", help="print every tensor")
    convert.add_argument("--json", action="store_true", help="print the report as JSON")

    checkpoints = add("checkpoints", _checkpoints, "What a run has kept, and whether it is whole.", _CHECKPOINTS_EPILOG)
    checkpoints.add_argument("run", type=Path, metavar="RUN", help="the run's directory")
    checkpoints.add_argument("--verify", choices=("sizes", "checksums"), default="sizes", help="default: %(default)s")
    checkpoints.add_argument("--json", action="store_true", help="print JSON instead of a table")

    ledger = add("ledger", _ledger, "What became of every group of a run, and whether it adds up.", _LEDGER_EPILOG)
    ledger.add_argument("run", type=Path, metavar="RUN", help="the run's directory")
    ledger.add_argument("--group", metavar="ID", help="show the life of this group instead")
    ledger.add_argument("--json", action="store_true", help="print JSON instead of tables")

    trace = add("trace", _trace, "The traces of a run's processes as one time line.", _TRACE_EPILOG)
    trace.add_argument("run", type=Path, metavar="RUN", help="the run's directory")
    trace.add_argument("--output", type=Path, metavar="FILE", help="default: RUN/trace_all.json")

    replay = add("replay", _replay, "Compute a recorded step again, in any layout, and compare.", _REPLAY_EPILOG)
    replay.add_argument("run", type=Path, metavar="RUN", help="the run's directory")
    replay.add_argument("step", type=int, metavar="STEP", help="a step that trainer.record_steps named, or that failed")
    replay.add_argument("overrides", nargs="*", metavar="OVERRIDE", help="changes to the recorded settings, as in: parallel=tp2")
    replay.add_argument("--tolerance", type=float, metavar="X", help="largest difference of every number; default: by precision")

    verify = add("verify-layout", _verify_layout, "Check a layout's logic, scaled down, on this CPU.", _VERIFY_EPILOG)
    _add_config_arguments(verify)
    verify.add_argument("--world-size", type=int, required=True, metavar="N", help="processes of the real job")
    verify.add_argument("--max-ranks", type=int, default=8, metavar="N", help="most processes here; default: %(default)s")
    verify.add_argument("--timeout", type=float, default=600.0, metavar="S", help="deadline of each run; default: %(default)s")
    verify.add_argument("--details", action="store_true", help="print every number that was compared")

    doctor = add("doctor", _doctor, "What this machine has, and which backend each part will use.", _DOCTOR_EPILOG)
    _add_config_arguments(doctor)
    doctor.add_argument("--json", action="store_true", help="print JSON instead of a table")
    return parser


def _add_config_arguments(parser: argparse.ArgumentParser, *, config_name: str = "train") -> None:
    parser.add_argument("overrides", nargs="*", metavar="OVERRIDE", help=_OVERRIDES_HELP)
    parser.add_argument("--config-dir", type=Path, metavar="DIR", help="a directory of yours, searched before the built-in files")
    parser.add_argument("--config-name", default=config_name, metavar="NAME", help="primary file; default: %(default)s")


# ---- commands -------------------------------------------------------------------------------------------------------------


def _train(arguments: argparse.Namespace) -> int:
    if arguments.print_config:
        return _print_config(_load(arguments, allow_missing=True))
    return _run_training(_load(arguments))


def _distill(arguments: argparse.Namespace) -> int:
    from skyrl_mega.config.distillation import as_distillation

    config = as_distillation(_load(arguments, allow_missing=arguments.print_config))
    return _print_config(config) if arguments.print_config else _run_training(config)


def _on_rows(arguments: argparse.Namespace) -> int:
    from skyrl_mega.config.offline import validate_offline
    from skyrl_mega.config.offline_schema import ROOTS

    config = _load(arguments, allow_missing=arguments.print_config, root=ROOTS[arguments.mode])
    if arguments.print_config:
        return _print_config(config)
    for warning in validate_offline(config, world_size=_from_environment("WORLD_SIZE", 1)):
        _say(f"warning: {warning}")
    try:
        from skyrl_mega.orchestration.offline_assemble import run_on_rows

        run_on_rows(config)
    except KeyboardInterrupt as stop:
        raise type(stop)(how_to_go_on(Path(config.trainer.run_dir))) from None
    return 0


def _print_config(config: Any) -> int:
    from skyrl_mega.config.load import to_yaml

    _say(to_yaml(config), end="", stream=sys.stdout)
    return 0


def _run_training(config: Config) -> int:
    config = _checked(config)
    try:
        from skyrl_mega.orchestration.assemble import run_training

        run_training(config)
    except KeyboardInterrupt as stop:
        raise type(stop)(how_to_go_on(Path(config.trainer.run_dir))) from None
    return 0


def _eval(arguments: argparse.Namespace) -> int:
    if (world_size := _from_environment("WORLD_SIZE", 1)) > 1:
        raise ConfigError(f"Evaluation runs in one process; got {world_size}. Start `skyrl-mega eval` without torchrun.")
    config = _load(arguments)
    if arguments.num_prompts is not None:
        config = dataclasses.replace(config, evaluation=dataclasses.replace(config.evaluation, num_prompts=arguments.num_prompts))
    if config.evaluation.num_prompts == 0:
        raise ConfigError("Evaluation needs prompts; `evaluation.num_prompts` is 0. Give `--num-prompts 128`.")
    # Whether the run directory may be continued is training's question; evaluating a used one is the common case.
    config = _checked(dataclasses.replace(config, checkpoint=dataclasses.replace(config.checkpoint, resume="auto")))
    from skyrl_mega.orchestration.assemble import run_evaluation

    run_evaluation(config, checkpoint=arguments.checkpoint, output=arguments.output)
    return 0


def _export(arguments: argparse.Namespace) -> int:
    if not arguments.run.is_dir():
        raise ConfigError(f"`--run` must be the directory of a run; got `{arguments.run}`. Give what `trainer.run_dir` was.")
    from skyrl_mega.checkpoint.export import export_run

    export_run(str(arguments.run), arguments.checkpoint, str(arguments.output))
    _say(f"wrote {arguments.output}", stream=sys.stdout)
    return 0


def _convert(arguments: argparse.Namespace) -> int:
    if not arguments.source.is_dir():
        raise ConfigError(f"SOURCE must be a directory; got `{arguments.source}`. Give a model's or a checkpoint's.")
    from skyrl_mega.launch.convert import run_convert

    return run_convert(
        arguments.source,
        arguments.output,
        arguments.overrides,
        model=arguments.model,
        dtype=arguments.dtype,
        check_logprobs=arguments.check_logprobs,
        details=arguments.details,
        as_json=arguments.json,
        world_size=_from_environment("WORLD_SIZE", 1),
    )


def _checkpoints(arguments: argparse.Namespace) -> int:
    if not arguments.run.is_dir():
        raise ConfigError(f"RUN must be the directory of a run; got `{arguments.run}`. Give what `trainer.run_dir` was.")
    from skyrl_mega.launch.checkpoints import run_checkpoints

    return run_checkpoints(arguments.run, verify=arguments.verify, as_json=arguments.json)


def _ledger(arguments: argparse.Namespace) -> int:
    from skyrl_mega.launch.ledger import run_ledger

    return run_ledger(arguments.run, group=arguments.group, as_json=arguments.json)


def _trace(arguments: argparse.Namespace) -> int:
    if not arguments.run.is_dir():
        raise ConfigError(f"RUN must be the directory of a run; got `{arguments.run}`. Give what `trainer.run_dir` was.")
    from skyrl_mega.launch.trace import run_trace

    return run_trace(arguments.run, destination=arguments.output)


def _replay(arguments: argparse.Namespace) -> int:
    if not arguments.run.is_dir():
        raise ConfigError(f"RUN must be the directory of a run; got `{arguments.run}`. Give what `trainer.run_dir` was.")
    if arguments.tolerance is not None and not arguments.tolerance >= 0:
        raise ConfigError(f"`--tolerance` must be >= 0; got {arguments.tolerance}. Leave it out for the default.")
    from skyrl_mega.launch.replay import run_replay

    return run_replay(
        arguments.run,
        arguments.step,
        arguments.overrides,
        tolerance=arguments.tolerance,
        world_size=_from_environment("WORLD_SIZE", 1),
        shows=_from_environment("RANK", 0) == 0,
    )


def _verify_layout(arguments: argparse.Namespace) -> int:
    if (launched := _from_environment("WORLD_SIZE", 1)) > 1:
        raise ConfigError(f"`verify-layout` starts its ranks itself; got {launched} processes. Start it without torchrun.")
    if arguments.max_ranks < 2:
        raise ConfigError(f"`--max-ranks` must be at least 2; got {arguments.max_ranks}. The default is 8.")
    if not arguments.timeout > 0:
        raise ConfigError(f"`--timeout` must be above 0; got {arguments.timeout}. The default is 600.")
    from skyrl_mega.launch.verify_layout import run_verify_layout

    return run_verify_layout(
        _load(arguments),
        world_size=arguments.world_size,
        max_ranks=arguments.max_ranks,
        timeout_s=arguments.timeout,
        details=arguments.details,
    )


def _doctor(arguments: argparse.Namespace) -> int:
    from skyrl_mega.launch.doctor import run_doctor

    has_config = bool(arguments.overrides) or arguments.config_dir is not None or arguments.config_name != "train"
    config = _load(arguments) if has_config else None
    return run_doctor(config, world_size=_from_environment("WORLD_SIZE", 1), as_json=arguments.json)


def _load(arguments: argparse.Namespace, *, allow_missing: bool = False, root: type | None = None) -> Any:
    """The configuration of schema `root`; reinforcement learning's unless given."""
    from skyrl_mega.config.load import load_config
    from skyrl_mega.config.schema import Config

    return load_config(
        arguments.overrides,
        config_name=arguments.config_name,
        config_dir=arguments.config_dir,
        allow_missing=allow_missing,
        root=root or Config,
    )


def _checked(config: Config) -> Config:
    """The configuration, once every rule holds; warnings go to stderr."""
    from skyrl_mega.config.validate import validate

    for warning in validate(config, world_size=_from_environment("WORLD_SIZE", 1)):
        _say(f"warning: {warning}")
    return config


# ---- terminal -------------------------------------------------------------------------------------------------------------


def _from_environment(name: str, default: int) -> int:
    text = os.environ.get(name, "")
    if not text:
        return default
    if not text.isdecimal():
        raise ConfigError(f"The environment variable {name} must be a whole number, as torchrun sets it; got `{text}`. Unset it.")
    return int(text)


def _report(error: SkyRLMegaError) -> None:
    """The message on stderr. A configuration error is the same on every rank and told once; another by the rank it hit."""
    rank = os.environ.get("RANK", "0")
    if rank in ("", "0"):
        _say(f"error: {error}")
    elif not isinstance(error, ConfigError):
        print(f"error on rank {rank}: {error}", file=sys.stderr, flush=True)


def _say(text: str, *, end: str = "\n", stream=None) -> None:
    """Prints on rank 0 only; to stderr unless told otherwise."""
    if os.environ.get("RANK", "0") in ("", "0"):
        print(text, end=end, file=stream or sys.stderr, flush=True)


def exit_with_main() -> NoReturn:
    """What the entry modules call: ends the process with `main`'s code."""
    raise SystemExit(main())


if __name__ == "__main__":
    exit_with_main()
