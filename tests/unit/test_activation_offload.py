"""Activations that wait in host memory: all but weights leave, and the updates are bit for bit the same."""

import pytest
import torch

from helpers.policy import make_policy, tiny_config
from helpers.updates import clones, update
from skyrl_mega.models import activation_offload
from skyrl_mega.models.activation_offload import ActivationOffload


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_updates_are_bit_for_bit_those_without(recompute, tmp_path, monkeypatch):
    moved = []
    to_host = ActivationOffload._to_host
    monkeypatch.setattr(ActivationOffload, "_to_host", lambda self, saved: moved.append(saved.nbytes) or to_host(self, saved))
    monkeypatch.setattr(ActivationOffload.__init__, "__defaults__", (1,))  # these activations are small
    settings = [f"model.recompute={recompute}", "optimizer.lr=1e-3"]
    weights = []
    for layers in (0, 2):
        with make_policy(tiny_config(tmp_path, *settings, f"model.offload_layers={layers}")) as policy:
            for seed in (1, 2):
                update(policy, seed)
            weights.append(clones(policy))
        assert bool(moved) == (layers > 0)
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_what_a_layer_saves_moves_but_weights_and_small_tensors_stay():
    offload = ActivationOffload(torch.device("cpu"), min_bytes=1024)
    layer = torch.nn.Linear(64, 64, bias=False)
    offload.wrap([layer])
    x = torch.randn(32, 64, requires_grad=True)
    layer(x).square().sum().backward()
    assert offload.moved_bytes == x.nbytes, "the layer saves its input and its weight; the square is not the layer's"
    layer(torch.randn(1, 64, requires_grad=True)).sum().backward()
    assert offload.moved_bytes == x.nbytes
    assert torch.allclose(x.grad, 2 * (x @ layer.weight.T) @ layer.weight, atol=1e-5)


def test_small_tensors_stay_by_default():
    assert ActivationOffload(torch.device("cpu"))._min_bytes == activation_offload.MIN_BYTES
