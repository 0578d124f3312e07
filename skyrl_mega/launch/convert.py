"""`skyrl-mega convert`: from a Hugging Face directory to a Megatron checkpoint or back, with a report of every tensor."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from skyrl_mega.config.load import load_config
from skyrl_mega.config.validate import validate
from skyrl_mega.errors import ConfigError

if TYPE_CHECKING:
    from skyrl_mega.orchestration.conversion import Conversion

REPORT_FILE = "conversion.json"
#: Tensors that differ are all listed; of those that agree only the first few, unless asked for.
SHOWN = 5


def run_convert(
    source: Path,
    output: Path,
    overrides: Sequence[str],
    *,
    model: Path | None,
    dtype: str,
    check_logprobs: bool,
    details: bool,
    as_json: bool,
    world_size: int,
) -> int:
    """Converts, writes OUTPUT/conversion.json, prints, and returns the exit code: 0 where everything agrees. All ranks call."""
    if bad := [text for text in overrides if not text.startswith(("parallel.", "parallel=", "trainer.device="))]:
        raise ConfigError(
            "`convert` takes overrides of the layout only (parallel.tensor=2, parallel=tp2, trainer.device=cuda);"
            f" got {', '.join(bad)}."
        )
    if output.exists():
        raise ConfigError(f"`OUTPUT` must be a directory that does not exist; `{output}` does.")
    from skyrl_mega.orchestration.conversion import convert, describe_source, model_config
    from skyrl_mega.parallel.device import resolve_device
    from skyrl_mega.parallel.topology import init_topology

    place = describe_source(source, model=model, dtype=dtype)
    config = model_config(place, load_config(["recipe=tiny", f"model.path={place.model_path}", *overrides]))
    # What is converted is not run: only the layout and the model's config have to fit.
    validate(config, world_size=world_size, check_files=place.direction == "hf to megatron", check_surroundings=False)
    topology = init_topology(config.parallel, resolve_device(config.trainer.device), seed=0)
    try:
        report = convert(place, output, config, topology, check_logprobs=check_logprobs)
        agrees = bool(topology.broadcast_object(report.agrees, phase="converting"))
        if topology.is_main:
            (output / REPORT_FILE).write_text(json.dumps(report.as_dict(), indent=2) + "\n", encoding="utf-8")
            print(json.dumps(report.as_dict(), indent=2) if as_json else "\n".join(render(report, details=details)))
    finally:
        topology.destroy()
    return 0 if agrees else 1


def render(report: Conversion, *, details: bool) -> list[str]:
    """The lines that a person reads."""
    lines = [f"{report.source} -> {report.output} ({report.direction}, {report.dtype})"]
    wrong = [line for line in report.tensors if not line.is_same]
    shown = report.tensors if details else [*wrong, *[line for line in report.tensors if line.is_same][:SHOWN]]
    width = max((len(line.name) for line in shown), default=0)
    for line in shown:
        was = "" if line.source_dtype == line.dtype else f" (was {line.source_dtype})"
        verdict = "same bits" if line.is_same else "DIFFERS"
        lines.append(
            f"  {line.name:<{width}}  {list(line.shape)!s:<16} {line.dtype}{was}  max |diff| {line.max_abs_diff:.3g}  {verdict}"
        )
    if len(shown) < len(report.tensors):
        lines.append(f"  and {len(report.tensors) - len(shown)} more with the same bits (--details lists them)")
    if report.left_out:
        lines.append(f"  not carried over, since the model needs none of them: {', '.join(report.left_out)}")
    if report.logprob_diff is not None:
        verdict = "agrees" if report.logprob_diff <= report.logprob_tolerance else "DIFFERS"
        lines.append(f"  logprobs in float32: {report.logprob_diff:.2e} from Hugging Face's, {verdict}")
    same = len(report.tensors) - len(wrong)
    lines.append(
        f"{same} of {len(report.tensors)} tensors have the same bits after a round trip: {'good' if report.agrees else 'BAD'}"
    )
    lines.append(f"every tensor: {os.path.join(report.output, REPORT_FILE)}")
    return lines
