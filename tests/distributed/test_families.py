"""Every family in two ranks: logits as Hugging Face's, and an export as the files were, bit for bit.

One pair of processes runs all layouts, for all families each. That training in a layout is training in one process is in
`test_layout_matrix`; gradients of every parameter against Hugging Face are in `test_model_tp` and `test_models_parity`.
"""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from helpers.hf_oracle import load_oracle, make_micro_batch, make_sequences, oracle_logits, policy_logits
from helpers.spawn import run_cases
from helpers.tiny import write_tiny_model
from skyrl_mega.config.load import load_config

#: Family -> (tied, what its Hugging Face config has beside the sizes). Windows are shorter than most sequences.
FAMILIES = {
    "llama": (True, {"attention_bias": True}),
    "mistral": (False, {}),
    "qwen2": (True, {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1}),
    "qwen3": (False, {}),
    "gemma2": (True, {}),
    "gemma3_text": (True, {}),
    "qwen2_moe": (True, {}),
    "qwen3_moe": (False, {"num_experts": 6, "mlp_only_layers": [0]}),
    "mixtral": (False, {"sliding_window": 9}),
    "deepseek_v3": (False, {}),
    "glm4_moe": (True, {}),
}
EXPERTS = ("qwen2_moe", "qwen3_moe", "mixtral", "deepseek_v3", "glm4_moe")
LAYOUTS = {"tp2_sp": tuple(FAMILIES), "pp2": tuple(FAMILIES), "cp2": tuple(FAMILIES), "ep2": EXPERTS}
CASES = [(family, layout) for layout, families in LAYOUTS.items() for family in families]
LENGTHS = [2, 9, 30, 14]


def run_family(path, layout: str, topology) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """(logits [T, V], exported tensors) of this rank."""
    from megatron.core import tensor_parallel

    from skyrl_mega.models.build import build_model, output_weight
    from skyrl_mega.models.hf_io import HFExporter, load_hf_weights
    from skyrl_mega.training.schedule import forward_per_token
    from skyrl_mega.types import TrainBatch

    config = config_of(path, layout)
    chunks = build_model(config, topology)
    load_hf_weights(chunks, path, topology)
    vocab_size = chunks[-1].vocab_size

    def logits(hidden, micro_batch):
        local = policy_logits(hidden, output_weight(chunks[-1]), chunks[-1].architecture)
        return tensor_parallel.gather_from_tensor_model_parallel_region(local)[:, :vocab_size]

    micro_batch = make_micro_batch(make_sequences(LENGTHS, vocab_size))
    batch = TrainBatch([micro_batch], num_loss_tokens=int(micro_batch.loss_mask.sum()), num_sequences=len(LENGTHS))
    [logits_TV] = forward_per_token(chunks, batch, config, topology, logits, phase="logits")
    exporter = HFExporter(chunks, topology)
    return logits_TV, {name: tensor.clone() for name, tensor in exporter.iter_weights(torch.float32)}


def config_of(path, layout: str):
    return load_config(["recipe=tiny", f"parallel={layout}", f"model.path={path}", "precision=float32"])


def run_families(paths: dict, layout: str) -> dict:
    from skyrl_mega.parallel.topology import init_topology

    topology = init_topology(config_of(paths["llama"], layout).parallel, torch.device("cpu"), seed=0)
    results = {}
    for family in LAYOUTS[layout]:
        try:
            results[family] = run_family(paths[family], layout, topology)
        except Exception as error:
            raise RuntimeError(f"failed with {family}") from error
    topology.destroy()
    return results


@pytest.fixture(scope="module")
def paths(tmp_path_factory) -> dict:
    folder = tmp_path_factory.mktemp("families")
    return {
        family: write_tiny_model(folder / family, family, tied=tied, **settings) for family, (tied, settings) in FAMILIES.items()
    }


@pytest.fixture(scope="module")
def ranks(paths) -> list[dict]:
    return run_cases(run_families, 2, {layout: (paths, layout) for layout in LAYOUTS}, timeout_s=240)


@pytest.fixture(scope="module")
def expected(paths) -> dict[str, torch.Tensor]:
    with torch.no_grad():
        return {name: oracle_logits(load_oracle(path), make_sequences(LENGTHS, 272)) for name, path in paths.items()}


@pytest.mark.parametrize(("family", "layout"), CASES)
def test_two_ranks_give_hugging_faces_logits_and_the_files_tensors(family, layout, ranks, expected, paths):
    source = load_file(paths[family] / "model.safetensors")
    for results in ranks:
        logits, exported = results[layout][family]
        torch.testing.assert_close(logits, expected[family], rtol=0, atol=3e-5)
        assert exported.keys() == source.keys()
        assert all(torch.equal(tensor, exported[name]) for name, tensor in source.items())


def test_every_registered_family_is_covered():
    from skyrl_mega.models.families import FAMILIES as REGISTERED

    assert set(FAMILIES) == set(REGISTERED)


def test_the_configurations_list_of_families_is_the_registrys():
    from skyrl_mega.config.model_files import FAMILIES as CONFIGURABLE
    from skyrl_mega.models.families import FAMILIES as REGISTERED

    assert set(CONFIGURABLE) == set(REGISTERED)
