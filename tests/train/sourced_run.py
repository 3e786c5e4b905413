"""A tiny encoder-decoder, texts and pairs made up for it, and trainers of both tasks."""

import dataclasses
from typing import Any

import numpy as np
import torch

from moesaic.config import ModelConfig
from moesaic.data.pairs import Direction
from moesaic.data.sourced import SourcedBatch
from moesaic.data.translation import Pairs, Texts
from moesaic.families import family
from moesaic.models.encoder_decoder import EncoderDecoder
from moesaic.train.loop import Trainer
from moesaic.train.recipe import DataSettings, TrainSettings
from tests.train.tiny_run import DrawingTrainer, changed, packed_text

VOCAB_SIZE = 80
SENTINELS = tuple(range(79, 69, -1))
LANGUAGES = {"up": 68, "down": 69}
SPANS = DataSettings(task="span_corruption")
TRANSLATION = DataSettings(task="translation")
PACKED = dataclasses.replace(packed_text(), byte_lengths=np.ones(VOCAB_SIZE, dtype=np.int64), sentinel_ids=SENTINELS)


def switch(**fields: Any) -> ModelConfig:
    """One sparse layer in each stack of two, with a capacity that drops and a router that draws."""
    hf = {
        "model_type": "switch_transformers",
        "vocab_size": VOCAB_SIZE,
        "d_model": 20,
        "d_kv": 6,
        "d_ff": 24,
        "num_heads": 3,
        "num_layers": 2,
        "num_decoder_layers": 2,
        "num_sparse_encoder_layers": 1,
        "num_sparse_decoder_layers": 1,
        "num_experts": 5,
        "expert_capacity": 5,
        "dropout_rate": 0.1,
        "router_jitter_noise": 0.01,
        "eos_token_id": 0,
    }
    return family("switch_transformers").from_hf(hf | fields)


def nllb() -> ModelConfig:
    """Top-2 with a drawn second expert and a capacity for the whole batch."""
    stacks = {
        f"{stack}_{name}": value
        for stack in ("encoder", "decoder")
        for name, value in (("layers", 2), ("ffn_dim", 24), ("attention_heads", 4), ("sparse_step", 2))
    }
    hf = {
        "model_type": "nllb-moe",
        "vocab_size": VOCAB_SIZE,
        "d_model": 20,
        "num_experts": 5,
        "expert_capacity": 64,
        "second_expert_policy": "random",
        "max_position_embeddings": 64,
        "pad_token_id": 0,
        "eos_token_id": 0,
        "decoder_start_token_id": 0,
        **stacks,
    }
    return family("nllb_moe").from_hf(hf)


def pairs(num_segments: int = 120) -> Pairs:
    """Each text in the one language is the other's backwards, with a word more at the end."""
    generator = np.random.default_rng(0)
    up = [generator.integers(1, 60, generator.integers(3, 9)) for _ in range(num_segments)]
    down = [np.append(row[::-1], 61) for row in up]
    directions = [Direction("down", "up"), Direction("up", "down")]
    numbers = np.arange(num_segments)
    return Pairs(
        texts={
            name: Texts(np.concatenate(rows).astype(np.uint16), np.cumsum([0, *map(len, rows)]))
            for name, rows in (("up", up), ("down", down))
        },
        train={direction: numbers[20:] for direction in directions},
        held_out={direction: numbers[:20] for direction in directions},
        language_ids=LANGUAGES,
        byte_lengths=np.ones(VOCAB_SIZE, dtype=np.int64),
        eos_id=0,
        digest="pairs",
    )


def first_batch() -> SourcedBatch:
    """Of translations, with padding on both sides."""
    batch = trainer("translation").batches.batch(0)
    assert isinstance(batch, SourcedBatch)
    return batch


def logits_of(model: EncoderDecoder, batch: SourcedBatch) -> torch.Tensor:
    """What the model says of every target, without the trainer's help."""
    arrays = (batch.source_ids_BM, batch.inputs_BS, batch.source_mask_BM, batch.document_ids_BS >= 0)
    with torch.no_grad():
        return model.eval()(*map(torch.from_numpy, arrays))


def trainer(task: str, settings: TrainSettings | None = None, **more: Any) -> Trainer:
    """A Switch model at span corruption, or an NLLB at translation; every step draws random numbers beside."""
    config, text, data = (switch(), PACKED, SPANS) if task == "span_corruption" else (nllb(), pairs(), TRANSLATION)
    settings = settings or changed()
    model = EncoderDecoder(config).initialize(settings.seed)
    return DrawingTrainer(model, settings, text, **{"data": data, **more})
