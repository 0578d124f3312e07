"""How far from float64 are the LM heads: ours, eager and the rivals, each with the same inputs?

SmolLM2-135M's head (H=576, V=49152), T=256, inputs of unit scale, so that logits lie within about 5 of each other, and the
same with 110 added to every logit. The error is the largest difference from float64 autograd of the plain formula, which reads
the same (rounded) inputs; gradients are divided by the largest gradient of float64. Not a bench: nothing is timed.

    python scripts/bench/lm_head_errors.py --rivals DIR --json docs/benchmarks/lm_head_errors.json
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))  # so that a test may load this file by its path

import lm_head_rivals as rivals

from skyrl_mega.telemetry.versions import collect_versions, git_commit, hardware
from skyrl_mega_kernels.extension import why_absent
from skyrl_mega_kernels.linear_logprobs import linear_logprobs

TOKENS, HIDDEN, VOCAB = 256, 576, 49152
QUANTITIES = ("logprobs", "entropy", "grad_hidden", "grad_weight")


def make_inputs(dtype: torch.dtype, offset: float):
    """hidden, weight, labels, incoming gradients; `offset` is added to every logit."""
    generator = torch.Generator().manual_seed(0)
    hidden_TH = torch.randn(TOKENS, HIDDEN, generator=generator)
    weight_VH = torch.randn(VOCAB, HIDDEN, generator=generator).mul_(HIDDEN**-0.5)
    if offset:
        hidden_TH[:, 0], weight_VH[:, 0] = offset, 1.0
    labels_T = torch.randint(0, VOCAB, (TOKENS,), generator=generator)
    return hidden_TH.to(dtype), weight_VH.to(dtype), labels_T, torch.randn(2, TOKENS, generator=generator)


def outputs(head: Callable, hidden_TH, weight_VH, labels_T, grads_2T) -> list[torch.Tensor | None]:
    """(logprobs, entropy, gradient of hidden, gradient of weight) in float64, of grads . (logprobs, entropy)."""
    hidden_TH, weight_VH = hidden_TH.clone().requires_grad_(), weight_VH.clone().requires_grad_()
    logprobs_T, entropy_T = head(hidden_TH, weight_VH, labels_T)
    loss = logprobs_T @ grads_2T[0].to(logprobs_T.dtype)
    if entropy_T is not None:
        loss = loss + (entropy_T @ grads_2T[1].to(entropy_T.dtype)).to(loss.dtype)
    loss.backward()
    found = (logprobs_T, entropy_T, hidden_TH.grad, weight_VH.grad)
    return [None if tensor is None else tensor.detach().double() for tensor in found]


def exact_head(hidden_TH, weight_VH, labels_T):
    table_TV = (hidden_TH @ weight_VH.t()).log_softmax(-1)
    return table_TV.gather(1, labels_T[:, None])[:, 0], -(table_TV.exp() * table_TV).sum(-1)


def ours(backend: str) -> Callable:
    def head(*inputs):
        output = linear_logprobs(*inputs, return_entropy=True, backend=backend)
        return output.logprobs, output.entropy

    return head


def heads() -> dict[str, Callable[[], Callable]]:
    """Every head that can be loaded here, by name; one that can't is named on standard error."""
    found = {"linear_logprobs reference": lambda: ours("reference")}
    if reason := why_absent("_C"):
        print(f"skipped: linear_logprobs cpu: {reason}", file=sys.stderr)
    else:
        found["linear_logprobs cpu"] = lambda: ours("cpu")
    for name, rival in rivals.RIVALS.items():
        if reason := rivals.why_absent(rival):
            print(f"skipped: {name}: {reason}", file=sys.stderr)
        else:
            found[name] = rival.load
    return found


def errors(found: list[torch.Tensor | None], exact: list[torch.Tensor]) -> dict[str, float | None]:
    """Largest errors by quantity; None for what a head does not give."""
    scales = [1.0, 1.0, exact[2].abs().max().item(), exact[3].abs().max().item()]
    return {
        name: None if mine is None else (mine - true).abs().max().item() / scale
        for name, mine, true, scale in zip(QUANTITIES, found, exact, scales, strict=True)
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--rivals", type=Path, metavar="DIR", help=f"packages of the rivals (or {rivals.RIVALS_ENV})")
    args = parser.parse_args()
    if args.rivals is not None:
        os.environ[rivals.RIVALS_ENV] = str(args.rivals.resolve())
    records = []
    for dtype in (torch.float32, torch.bfloat16):
        for offset in (0.0, 110.0):
            inputs = make_inputs(dtype, offset)
            doubles = (inputs[0].double(), inputs[1].double(), inputs[2], inputs[3].double())
            exact = outputs(exact_head, *doubles)
            without_entropy = outputs(lambda *arguments: (exact_head(*arguments)[0], None), *doubles)
            for name, load in heads().items():
                found = outputs(load(), *inputs)
                row = errors(found, exact if found[1] is not None else without_entropy)
                records.append({"variant": name, "dtype": str(dtype).removeprefix("torch."), "offset": offset, **row})
                numbers = "  ".join(f"{q} {'-' if row[q] is None else format(row[q], '.1e')}" for q in QUANTITIES)
                print(f"{records[-1]['dtype']:9} {offset:+5.0f}  {name:44} {numbers}", flush=True)
    if args.json is not None:
        made_with = {
            "date": time.strftime("%Y-%m-%d", time.gmtime()),
            "hardware": hardware(),
            "versions": {**collect_versions(), **rivals.versions()},
            "commit": git_commit(),
        }
        args.json.write_text(json.dumps({**made_with, "errors": records}, indent=1) + "\n")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
