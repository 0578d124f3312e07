"""8-bit weights: how far they are from what they stand for, their names, and that the engine is told of them."""

from __future__ import annotations

import pytest
import torch

from helpers.model_source import ModelSource
from skyrl_mega.config.schema import RolloutConfig
from skyrl_mega.rollout.vllm_arguments import engine_arguments
from skyrl_mega.weights.fp8 import LARGEST, Fp8Source, as_engines_take, quantize


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [1e-6, 1.0, 1e6])
def test_a_number_is_off_by_a_sixteenth_of_itself_or_a_thousandth_of_its_rows_largest(dtype, size):
    weight = (size * torch.randn(64, 200, generator=torch.Generator().manual_seed(0))).to(dtype)
    quantized, scale = quantize(weight)
    assert (quantized.dtype, quantized.shape) == (torch.float8_e4m3fn, (64, 200))
    assert (scale.dtype, scale.shape) == (torch.float32, (64, 1))
    right, got = weight.double(), quantized.double() * scale.double()
    largest = right.abs().amax(dim=1, keepdim=True)
    assert ((got - right).abs() <= torch.maximum(right.abs() / 16, largest * 2**-18) * (1 + 1e-6)).all()
    # The row's largest is kept to a float32's precision.
    torch.testing.assert_close(got.abs().amax(dim=1, keepdim=True), largest, rtol=1e-6, atol=0.0)


def test_rows_of_zeros_and_of_one_number_survive():
    weight = torch.zeros(3, 16)
    weight[1] = -3.0
    weight[2, 5] = torch.finfo(torch.bfloat16).max
    quantized, scale = quantize(weight)
    assert quantized.float().isfinite().all()
    assert quantized.float().abs().max() <= LARGEST
    torch.testing.assert_close(quantized.float() * scale, weight, rtol=1e-6, atol=0.0)


@pytest.fixture(scope="module")
def source(tiny_model_dir):
    from transformers import AutoModelForCausalLM

    return ModelSource(AutoModelForCausalLM.from_pretrained(tiny_model_dir))


def test_every_matrix_of_a_layer_is_followed_by_its_scale_in_its_group(source):
    eight_bit = Fp8Source(source)
    whole, halved = dict(source.iter_weights(torch.bfloat16)), dict(eight_bit.iter_weights(torch.bfloat16))
    assert [name for name in halved if not name.endswith("_scale")] == list(whole)
    matrices = {name for name in whole if name.endswith("_proj.weight")}
    assert {name.removesuffix("_scale") for name in halved if name.endswith("_scale")} == matrices
    for name, tensor in whole.items():
        if name in matrices:
            assert torch.equal(halved[name].float(), quantize(tensor)[0].float())
        else:
            assert halved[name].dtype == torch.bfloat16, name
            assert torch.equal(halved[name], tensor), name
    groups = eight_bit.fused_groups()
    assert sorted(name for group in groups for name in group) == sorted(halved)
    [attention] = [group for group in groups if "model.layers.0.self_attn.q_proj.weight" in group]
    assert len(attention) == 6


def test_engines_get_what_they_were_started_for(source):
    assert as_engines_take(source, RolloutConfig()) is source
    assert isinstance(as_engines_take(source, RolloutConfig(quantization="fp8")), Fp8Source)


def test_vllm_reads_the_format_as_8_bit_weights_by_channel_and_activations_by_token():
    from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors import CompressedTensorsConfig

    arguments = engine_arguments(RolloutConfig(quantization="fp8"), model_path="unused", seed=0, device="cpu")
    assert arguments["load_format"] == "dummy"
    config = CompressedTensorsConfig.from_config(arguments["hf_overrides"]["quantization_config"])
    scheme = config.target_scheme_map["Linear"]
    assert (scheme["weights"].strategy, scheme["weights"].dynamic) == ("channel", False)
    assert (scheme["input_activations"].strategy, scheme["input_activations"].dynamic) == ("token", True)
    assert config._is_fp8_w8a8(scheme["weights"], scheme["input_activations"])
    assert "lm_head" in config.ignore
    assert "hf_overrides" not in engine_arguments(RolloutConfig(), model_path="unused", seed=0, device="cpu")
