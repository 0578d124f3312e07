"""Other people's LM heads behind one signature: (hidden, weight, labels) -> (logprobs, entropy or None), both [T].

None of their code is kept here: torch's own are called where they are, the others from a directory that holds their wheels,

    pip install --no-deps --target DIR cut-cross-entropy trl verl

which the environment variable SKYRL_MEGA_BENCH_RIVALS names. Entropy None: the rival has none. Each is called the way its
own trainer calls it, with its own defaults; what that means for the comparison is said at each.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from types import ModuleType

RIVALS_ENV = "SKYRL_MEGA_BENCH_RIVALS"


@dataclass(frozen=True)
class Rival:
    """`load` returns the head; `matmuls` counts the GEMMs of 2 T H V FLOPs that it runs forward and backward.

    `package` and `file` say where it lies under the rivals' directory (None: torch has it). `compiles`: it needs a first call
    that compiles.
    """

    load: Callable[[], Callable]
    matmuls: int
    package: str | None = None
    file: str | None = None
    compiles: bool = False


def eager() -> Callable:
    """The formula as trainers without a fused head write it: logits in the inputs' dtype, then a float32 log-softmax."""

    def head(hidden, weight, labels):
        table = (hidden @ weight.t()).float().log_softmax(-1)
        return table.gather(1, labels[:, None])[:, 0], -(table.exp() * table).sum(-1)

    return head


def compiled() -> Callable:
    import torch

    return torch.compile(eager(), fullgraph=True)


def torch_linear_cross_entropy(chunked: bool) -> Callable:
    """`F.linear_cross_entropy`: the reference path keeps the logits, the chunked one computes them again. No entropy."""
    import torch

    options = torch.nn.LinearCrossEntropyOptions() if chunked else None

    def head(hidden, weight, labels):
        loss = torch.nn.functional.linear_cross_entropy(hidden, weight, labels, reduction="none", options=options)
        return -loss, None

    return head


def cut_cross_entropy() -> Callable:
    """Apple's CCE, arXiv:2411.09009, by its `torch_compile` implementation: the one of Triton needs a GPU. No entropy."""
    rivals_on_path()
    from cut_cross_entropy import linear_cross_entropy

    def head(hidden, weight, labels):
        return -linear_cross_entropy(hidden, weight, labels, reduction="none", impl="torch_compile"), None

    return head


def trl() -> Callable:
    """TRL takes logits as the model gave them: in bfloat16 its log-softmax and entropy are computed in bfloat16."""
    rivals_on_path()
    from trl.trainer.utils import entropy_from_logits, selective_log_softmax

    def head(hidden, weight, labels):
        logits = hidden @ weight.t()
        return selective_log_softmax(logits, labels), entropy_from_logits(logits)

    return head


def verl() -> Callable:
    """verl's chunked head with recomputation; its entropy comes out in the inputs' dtype."""
    # The file alone: importing the package needs ray, which has nothing to do with a head.
    return load_file(rivals_directory() / RIVALS["verl FusedLinearForPPO"].file).FusedLinearForPPO()


RIVALS: dict[str, Rival] = {
    "eager": Rival(eager, matmuls=3),
    "torch.compile of eager": Rival(compiled, matmuls=3, compiles=True),
    "F.linear_cross_entropy (no entropy)": Rival(lambda: torch_linear_cross_entropy(False), matmuls=3),
    "F.linear_cross_entropy chunked (no entropy)": Rival(lambda: torch_linear_cross_entropy(True), matmuls=4),
    "cut-cross-entropy (no entropy)": Rival(
        cut_cross_entropy, 3, "cut-cross-entropy", "cut_cross_entropy/__init__.py", compiles=True
    ),
    "TRL selective_log_softmax": Rival(trl, 3, "trl", "trl/trainer/utils.py"),
    "verl FusedLinearForPPO": Rival(verl, 4, "verl", "verl/utils/experimental/torch_functional.py"),
}


def why_absent(rival: Rival) -> str | None:
    """None where the rival can be loaded, else the reason and the remedy."""
    if rival.file is None:
        return None
    remedy = f"pip install --no-deps --target DIR {rival.package}, then --rivals DIR"
    if not os.environ.get(RIVALS_ENV):
        return f"no directory of rivals was given: {remedy}"
    if not (rivals_directory() / rival.file).is_file():
        return f"{rival.file} is not in the directory of rivals: {remedy}"
    return None


def versions() -> dict[str, str]:
    """Versions of the rivals' packages that the directory holds, by name."""
    if not os.environ.get(RIVALS_ENV):
        return {}
    packages = {rival.package for rival in RIVALS.values()}
    found = {dist.name.replace("_", "-"): dist.version for dist in metadata.distributions(path=[str(rivals_directory())])}
    return {name: version for name, version in found.items() if name in packages}


def rivals_directory() -> Path:
    return Path(os.environ[RIVALS_ENV])


def rivals_on_path() -> None:
    # Last: the directory may hold copies of packages that are installed, and those are the ones to measure with.
    sys.path.append(str(rivals_directory()))


def load_file(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
