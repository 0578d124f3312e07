"""Weights of a Hugging Face model into engines, through the shared-memory writer and any weight receivers; and how to tell."""

from __future__ import annotations

import copy

import torch

WAIT_S = 120


def perturbed(model, seed, scale=0.5):
    """A copy of `model` with noise on every weight."""
    model = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * parameter.std() * scale)
    return model


def push(writer, receivers, model, version):
    """Every engine of `receivers` serves `model` as `version` when this returns. Called from outside their event loop."""
    for future in [receiver.begin(version) for receiver in receivers]:
        future.result(WAIT_S)
    bucket = writer.write((name, parameter.detach()) for name, parameter in model.named_parameters())
    for future in [receiver.load(bucket) for receiver in receivers]:
        future.result(WAIT_S)
    for future in [receiver.report() for receiver in receivers]:
        assert [report["error"] for report in future.result(WAIT_S)] == [""]
    for future in [receiver.commit(version) for receiver in receivers]:
        future.result(WAIT_S)


@torch.no_grad()
def logprob_errors(model, prompt, completion):
    """|engine - Hugging Face| of each sampled token, float [T]."""
    sequence = [*prompt, *completion.token_ids]
    logprobs = model(torch.tensor([sequence])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
    expected = logprobs.gather(1, torch.tensor(list(completion.token_ids))[:, None])[:, 0]
    return (torch.tensor(list(completion.logprobs)) - expected).abs()
