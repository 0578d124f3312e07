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
