"""docs/models.md has a row for every family, and its example of adding one is right as it stands."""

import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from helpers.hf_oracle import load_oracle, make_micro_batch, make_sequences, oracle_logits
from helpers.tiny import write_tiny_model
from skyrl_mega.config.schema import Config, ModelConfig, ParallelConfig
from skyrl_mega.models.build import build_model, forward_hidden, output_weight
from skyrl_mega.models.families import FAMILIES
from skyrl_mega.models.hf_io import HFExporter, load_hf_weights
from skyrl_mega.parallel.device import resolve_device
from skyrl_mega.parallel.topology import init_topology

PAGE = Path(__file__).parents[2] / "docs" / "models.md"


def test_every_family_has_a_row():
    rows = set(re.findall(r"^\|[^|]*\| `(\w+)` \|", PAGE.read_text(), re.MULTILINE))
    assert rows - {"model_type"} == set(FAMILIES)


@pytest.fixture
def topology():
    topology = init_topology(ParallelConfig(), resolve_device("cpu"), seed=0)
    yield topology
    topology.destroy()


@torch.no_grad()
def test_the_example_adds_a_family(topology, tmp_path, monkeypatch):
    [code] = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    names: dict = {}
    exec(code, names)
    monkeypatch.setitem(FAMILIES, "gemma", names["GEMMA"])
    path = write_tiny_model(tmp_path, "gemma", attention_bias=True)
    [model] = build_model(Config(model=ModelConfig(path=str(path), dtype="float32")), topology)
    load_hf_weights([model], path, topology)
    sequences = make_sequences([7, 30, 12], 272)
    logits = forward_hidden(model, make_micro_batch(sequences)) @ output_weight(model).t()
    torch.testing.assert_close(logits, oracle_logits(load_oracle(path), sequences), rtol=0, atol=2e-5)
    exported = dict(HFExporter([model], topology).iter_weights(torch.float32))
    source = load_file(path / "model.safetensors")
    assert source.keys() == exported.keys()
    assert all(torch.equal(tensor, exported[name]) for name, tensor in source.items())
