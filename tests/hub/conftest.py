"""A small Mixtral on disk, to be loaded, damaged and replaced."""

from pathlib import Path

import pytest
import torch

from moesaic import families
from moesaic.config import ModelConfig
from moesaic.hub import save
from moesaic.models.decoder import Decoder

TINY = {
    "model_type": "mixtral",
    "vocab_size": 131,
    "hidden_size": 24,
    "intermediate_size": 7,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_local_experts": 3,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": [2, 5],
}


@pytest.fixture
def config() -> ModelConfig:
    return families.from_hf(TINY)


@pytest.fixture
def model(config: ModelConfig) -> Decoder:
    return Decoder(config, dtype=torch.float32).initialize(seed=5)


@pytest.fixture
def folder(model: Decoder, tmp_path: Path) -> Path:
    """A sharded checkpoint."""
    save(model, tmp_path / "tiny", max_shard_bytes=10_000)
    return tmp_path / "tiny"
