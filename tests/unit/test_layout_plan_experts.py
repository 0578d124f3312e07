"""A layout with experts, cut to what a laptop can check."""

from __future__ import annotations

import pytest

from helpers.tiny import write_tiny_model
from skyrl_mega.config.schema import ParallelConfig
from skyrl_mega.launch.layout_plan import small_layouts
from skyrl_mega.models.families import read_architecture
from skyrl_mega.models.scaled_down import write_scaled_down


def test_expert_ranks_are_laid_over_those_of_the_axes_that_stay_split():
    whole = ParallelConfig(tensor=4, pipeline=4, expert=32, expert_tensor=4, sequence_parallel=True)
    assert [str(layout) for layout in small_layouts(whole, data=8, max_ranks=8)] == ["TP2+SP x PP2 x EP2 x DP2+distopt"]
    parts = {str(layout): layout.parallel.expert_tensor for layout in small_layouts(whole, data=8, max_ranks=2)}
    assert parts == {"TP2+SP x EP2": 1, "PP2": 1, "EP2 x DP2+distopt": 1}


@pytest.mark.parametrize("family", ["qwen3_moe", "qwen2_moe", "mixtral"])
def test_a_mixture_is_scaled_down_with_experts_for_every_rank(family, tmp_path):
    large = {"num_hidden_layers": 6, "num_experts_per_tok": 3}
    large |= {"num_local_experts": 10} if family == "mixtral" else {"num_experts": 10, "mlp_only_layers": [0, 1, 2]}
    write_scaled_down(write_tiny_model(tmp_path / "large", family, **large), tmp_path / "small", num_layers=2, tensor=2, expert=2)
    experts = read_architecture(tmp_path / "small").experts
    assert experts.layers == ((True, True) if family == "mixtral" else (False, True))
    assert experts.count % 2 == 0
    assert 1 <= experts.per_token <= experts.count
    assert (experts.shared_ffn_size is not None) == (family == "qwen2_moe")


@pytest.mark.parametrize("family", ["deepseek_v3", "glm4_moe"])
@pytest.mark.parametrize("expert", [1, 2, 3])
def test_sigmoid_routers_are_scaled_down_with_their_groups_and_dense_layers(family, expert, tmp_path):
    large = {"num_hidden_layers": 6, "n_routed_experts": 24, "num_experts_per_tok": 8, "n_group": 6, "topk_group": 4}
    path = write_tiny_model(tmp_path / "large", family, num_nextn_predict_layers=1, first_k_dense_replace=3, **large)
    write_scaled_down(path, tmp_path / "small", num_layers=2, tensor=2, expert=expert)
    a = read_architecture(tmp_path / "small")
    assert a.experts.layers == (False, True)
    assert a.experts.count % expert == 0
    assert 1 <= a.experts.groups_per_token < a.experts.groups
    assert (a.latent is not None) == (family == "deepseek_v3")
    assert a.num_extra_layers == 0
