"""The sides of train_step.py: set-up functions that return one training step of SmolLM2-135M as a function.

Both sides get the same samples (see `make_samples`), start from the same weights, and return the numbers they must agree on:
the loss, the mean entropy, the mean distance of the logprobs to the sampler's, and the gradient norm before clipping.

The Hugging Face side is what its users run (TRL's GRPOTrainer, with what is slow there for no reason left out): prompts padded
on the left, responses on the right, one forward pass with `logits_to_keep`, sdpa attention, fused AdamW, float32 masters of
bfloat16 weights, gradients freed by `set_to_none`. Its parameters:

    head      "selective": TRL's selective_log_softmax, in bfloat16 on bfloat16 logits, as TRL computes it;
              "float32": the whole logits in float32, then a log-softmax, as most other trainers do
    order     "batch": rows in the batch's order, all padded to its longest prompt and response, as TRL and verl do;
              "sorted": by length, each micro-batch padded to its own longest row
    masters   "float32": bfloat16 weights and gradients, float32 masters and moments, as in ours;
              "autocast": float32 weights, bfloat16 matmuls by torch.autocast
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from skyrl_mega.types import TrainSample

MODEL = Path(__file__).parents[2] / ".cache" / "models" / "SmolLM2-135M-Instruct"
LEARNING_RATE = 1e-5
CLIP_GRAD_NORM = 1.0
CLIP_LOW, CLIP_HIGH = 0.2, 0.28


@dataclass(frozen=True)
class Shape:
    """Lengths of a batch: groups of prompts, samples of each, and how long they are.

    With `spread` > 0 response lengths are lognormal around `response` (sigma `spread`), prompts uniform within half of
    `prompt` around it; no row is longer than `longest`. A micro-batch has at most `rows` rows (theirs) or `tokens` tokens (ours).
    """

    groups: int
    group_size: int
    prompt: int
    response: int
    rows: int
    tokens: int
    spread: float = 0.0
    longest: int = 0


SHAPES = {
    # Equal lengths and no common prompts: nothing to pack, nothing to share.
    "equal": Shape(groups=4, group_size=1, prompt=128, response=384, rows=4, tokens=2048),
    # Rollouts of a reasoning task; prompts are not shared here either, so that packing is all that differs.
    "long_tail": Shape(groups=16, group_size=1, prompt=64, response=110, rows=8, tokens=2048, spread=1.0, longest=512),
    # The quickstart's update: 17 of 22 tokens are prompt, in groups of 8.
    "shared": Shape(groups=16, group_size=8, prompt=17, response=5, rows=64, tokens=2048),
}


def make_samples(shape: Shape, seed: int = 0) -> list[TrainSample]:
    """Random tokens; an advantage per sample; logprobs of the sampler that are not the policy's."""
    import torch

    from skyrl_mega.types import TrainSample

    generator = torch.Generator().manual_seed(seed)

    def ids(count: int) -> torch.Tensor:
        return torch.randint(5, 40000, (count,), generator=generator)

    samples: list[TrainSample] = []
    for group in range(shape.groups):
        prompt_ids = ids(_prompt_length(shape, generator))
        for _ in range(shape.group_size):
            tokens = torch.cat([prompt_ids, ids(_response_length(shape, len(prompt_ids), generator))])
            mask = torch.arange(len(tokens)) >= len(prompt_ids)
            advantages = mask * torch.randn((), generator=generator)
            logprobs = mask * -(8.0 + 4.0 * torch.rand(len(tokens), generator=generator))
            samples.append(TrainSample(len(samples), group, f"g{group}", tokens, mask, logprobs, 0.0, advantages))
    return samples


def _prompt_length(shape: Shape, generator: torch.Generator) -> int:
    import torch

    if not shape.spread:
        return shape.prompt
    return int(torch.randint(shape.prompt // 2, shape.prompt * 3 // 2, (), generator=generator))


def _response_length(shape: Shape, prompt: int, generator: torch.Generator) -> int:
    import torch

    if not shape.spread:
        return shape.response
    drawn = shape.response * float(torch.randn((), generator=generator).mul(shape.spread).exp())
    return max(1, min(round(drawn), shape.longest - prompt))


# -- ours ---------------------------------------------------------------------------------------------------------------


def ours(shape: str, dtype: str) -> Callable[[], dict[str, float]]:
    """The trainer's own update, from its packed batch on."""
    import torch

    from skyrl_mega.config.load import load_config
    from skyrl_mega.data.packing import balance_and_pack
    from skyrl_mega.parallel.device import set_threads
    from skyrl_mega.parallel.topology import init_topology
    from skyrl_mega.training.policy import Policy

    set_threads(1)
    settings = [f"precision={dtype}", f"model.path={MODEL}", f"optimizer.lr={LEARNING_RATE}", "model.recompute=none"]
    settings += [f"optimizer.clip_grad_norm={CLIP_GRAD_NORM}", f"trainer.tokens_per_micro_batch={SHAPES[shape].tokens}"]
    config = load_config(["recipe=quickstart", *settings])
    policy = Policy.from_hf(config, init_topology(config.parallel, torch.device("cpu"), seed=0))
    batch = balance_and_pack(
        make_samples(SHAPES[shape]),
        tokens_per_micro_batch=config.trainer.tokens_per_micro_batch,
        dp_rank=0,
        dp_size=1,
        skip_zero_advantage=False,
        share_prompts=True,
    )

    def step() -> dict[str, float]:
        metrics = policy.train_step(batch)
        return {
            "loss": metrics["loss/total"],
            "entropy": metrics["policy/entropy"],
            "mismatch": metrics["mismatch/abs_logprob_diff_mean"],
            "grad_norm": metrics["update/grad_norm"],
        }

    return step


# -- Hugging Face ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PaddedRows:
    """Rows of one forward pass: prompts padded on the left, responses on the right; the last `response_BR` columns are theirs."""

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    response_ids_BR: torch.Tensor
    response_mask_BR: torch.Tensor
    advantages_BR: torch.Tensor
    rollout_logprobs_BR: torch.Tensor


def pad_rows(samples: Sequence[TrainSample], longest_prompt: int, longest_response: int) -> PaddedRows:
    import torch

    def rows(width: int) -> torch.Tensor:
        return torch.zeros(len(samples), width)

    ids, seen = rows(longest_prompt + longest_response).long(), rows(longest_prompt + longest_response).long()
    advantages, logprobs, mask = rows(longest_response), rows(longest_response), rows(longest_response).bool()
    for row, sample in enumerate(samples):
        prompt = _prompt_of(sample)
        response = sample.num_tokens - prompt
        start = longest_prompt - prompt
        ids[row, start : start + sample.num_tokens] = sample.token_ids
        seen[row, start : start + sample.num_tokens] = 1
        mask[row, :response] = True
        advantages[row, :response] = sample.advantages[prompt:]
        logprobs[row, :response] = sample.rollout_logprobs[prompt:]
    return PaddedRows(ids, seen, ids[:, longest_prompt:], mask, advantages, logprobs)


def padded_batches(samples: Sequence[TrainSample], shape: Shape, order: str) -> list[PaddedRows]:
    """The micro-batches of a Hugging Face trainer; see `order` in the module's docstring."""

    def longest(members: Sequence[TrainSample]) -> tuple[int, int]:
        prompts = [_prompt_of(sample) for sample in members]
        return max(prompts), max(s.num_tokens - prompt for s, prompt in zip(members, prompts, strict=True))

    if order == "sorted":
        samples = sorted(samples, key=lambda sample: sample.num_tokens)
    parts = [samples[start : start + shape.rows] for start in range(0, len(samples), shape.rows)]
    return [pad_rows(part, *longest(part if order == "sorted" else samples)) for part in parts]


def _prompt_of(sample: TrainSample) -> int:
    return int(sample.loss_mask.nonzero()[0])


def hugging_face(
    shape: str, dtype: str, head: str = "selective", order: str = "batch", masters: str = "float32"
) -> Callable[[], dict[str, float]]:
    import contextlib

    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(1)
    compute = getattr(torch, dtype)
    weights = torch.float32 if masters == "autocast" else compute
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=weights, attn_implementation="sdpa").train()
    parameters = list(model.parameters())
    has_masters = weights != torch.float32
    updated = [p.detach().float().requires_grad_() for p in parameters] if has_masters else parameters
    optimizer = torch.optim.AdamW(updated, lr=LEARNING_RATE, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, fused=True)
    samples = make_samples(SHAPES[shape])
    batches = padded_batches(samples, SHAPES[shape], order)
    num_loss_tokens = sum(sample.num_loss_tokens for sample in samples)
    logprobs_and_entropy = {"selective": selective_logprobs, "float32": float32_logprobs}[head]

    def autocast() -> contextlib.AbstractContextManager:
        return torch.autocast("cpu", compute) if masters == "autocast" else contextlib.nullcontext()

    def step() -> dict[str, float]:
        sums = dict.fromkeys(("loss", "entropy", "mismatch"), 0.0)
        for batch in batches:
            keep = batch.response_ids_BR.size(1) + 1
            with autocast():
                outputs = model(
                    input_ids=batch.input_ids, attention_mask=batch.attention_mask, logits_to_keep=keep, use_cache=False
                )
            logprobs, entropy = logprobs_and_entropy(outputs.logits[:, :-1], batch.response_ids_BR)
            del outputs
            ratio = (logprobs - logprobs.detach()).exp()
            clipped = ratio.clamp(1 - CLIP_LOW, 1 + CLIP_HIGH)
            per_token = -torch.min(ratio * batch.advantages_BR, clipped * batch.advantages_BR)
            loss = (per_token * batch.response_mask_BR).sum() / num_loss_tokens
            loss.backward()
            with torch.no_grad():
                away = (logprobs - batch.rollout_logprobs_BR).abs()
                sums["loss"] += float(loss)
                sums["entropy"] += float((entropy * batch.response_mask_BR).sum()) / num_loss_tokens
                sums["mismatch"] += float((away * batch.response_mask_BR).sum()) / num_loss_tokens
        if has_masters:
            for master, parameter in zip(updated, parameters, strict=True):
                master.grad = parameter.grad.float()
                parameter.grad = None
        grad_norm = torch.nn.utils.clip_grad_norm_(updated, CLIP_GRAD_NORM)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if has_masters:
            with torch.no_grad():
                torch._foreach_copy_(parameters, updated)
        return {**sums, "grad_norm": float(grad_norm)}

    return step


def selective_logprobs(logits_BRV: torch.Tensor, ids_BR: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """TRL 0.24's selective_log_softmax and, without gradient, entropy_from_logits in chunks of 128 rows."""
    import torch
    import torch.nn.functional as F

    if logits_BRV.dtype == torch.float32:
        chosen = logits_BRV.gather(-1, ids_BR[..., None]).squeeze(-1)
        logprobs = chosen - torch.stack([torch.logsumexp(row, dim=-1) for row in logits_BRV])
    else:  # there logsumexp is not precise enough
        rows = zip(logits_BRV, ids_BR, strict=True)
        logprobs = torch.stack([F.log_softmax(row, dim=-1).gather(-1, ids[:, None]).squeeze(-1) for row, ids in rows])
    entropies = []
    with torch.no_grad():
        for chunk in logits_BRV.flatten(0, 1).split(128):
            table = F.log_softmax(chunk, dim=-1)
            entropies.append(-(table.exp() * table).sum(-1))
    return logprobs.float(), torch.cat(entropies).view(ids_BR.shape).float()


def float32_logprobs(logits_BRV: torch.Tensor, ids_BR: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The whole table of log-probabilities in float32; the entropy, without gradient, from the same table."""
    import torch

    table = logits_BRV.float().log_softmax(-1)
    with torch.no_grad():
        entropy = torch.cat([-(part.exp() * part).sum(-1) for part in table.flatten(0, 1).split(128)])
    return table.gather(-1, ids_BR[..., None]).squeeze(-1), entropy.view(ids_BR.shape)
