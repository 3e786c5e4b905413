"""Llama 4 as it is released, text and images in one model: its text part is read, and what is left out is said."""

from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForImageTextToText

from moesaic import families
from moesaic.errors import ConfigError
from moesaic.hub import load, read_config, save

TEXT = {
    "vocab_size": 131,
    "hidden_size": 48,
    "intermediate_size": 37,
    "intermediate_size_mlp": 23,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 10,
    "num_local_experts": 5,
    "interleave_moe_layer_step": 2,
    "attention_chunk_size": 5,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
IMAGES = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "vision_output_dim": 16,
    "image_size": 28,
    "patch_size": 14,
    "projector_input_dim": 16,
    "projector_output_dim": 16,
}


@torch.no_grad()
def test_the_text_part_of_a_multimodal_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(3)
    config = AutoConfig.for_model("llama4", text_config=TEXT, vision_config=IMAGES)
    theirs = AutoModelForImageTextToText.from_config(config, attn_implementation="eager").eval()
    for parameter in theirs.parameters():
        parameter.normal_(0.0, 0.2)
    theirs.save_pretrained(tmp_path / "theirs")

    ours = load(tmp_path / "theirs")
    assert "(multi_modal_projector, vision_model) are left out, the text part is read" in capsys.readouterr().err
    ids_BS = torch.randint(131, (2, 13), generator=torch.Generator().manual_seed(4))
    expected = theirs(input_ids=ids_BS).logits
    assert (ours(ids_BS) - expected).abs().max() <= 1e-5 * expected.abs().max()

    save(ours, tmp_path / "ours")
    assert torch.equal(load(tmp_path / "ours")(ids_BS), ours(ids_BS))
    read = read_config(tmp_path / "ours")
    assert not capsys.readouterr().err
    assert read == read_config(tmp_path / "theirs")
    said = "config.json: only the text part (text_config, llama4_text) is read; left out: vision_config\n"
    assert capsys.readouterr().err == f"moesaic: {tmp_path / 'theirs'}/{said}"


def test_the_configuration_of_the_text_part_is_read() -> None:
    wrapped = {"model_type": "llama4", "text_config": TEXT, "vision_config": IMAGES, "eos_token_id": [7, 8]}
    config = families.from_hf(wrapped)
    assert config.family == "llama4_text"
    assert config == families.from_hf(TEXT | {"model_type": "llama4_text", "eos_token_id": [7, 8]})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model_type": "llama4"}, "text_config=None in a configuration of model_type llama4; it must be a table"),
        (TEXT | {"moe_layers": [3]}, "moe_layers=.3.; it must be a list of layers from 0 to 2"),
        (TEXT | {"no_rope_layers": [1, 0]}, "no_rope_layers=.1, 0.; give 1 .rotary positions. or 0 for each of 3"),
        (TEXT | {"layer_types": ["sliding_attention"] * 3}, "give chunked_attention or full_attention for each of 3"),
        (TEXT | {"attn_temperature_tuning": "yes"}, "attn_temperature_tuning='yes'; it must be true or false"),
        (TEXT | {"hidden_act": "gelu"}, "hidden_act='gelu' is not supported"),
    ],
)
def test_what_cannot_be_read_is_one_line(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        families.from_hf({"model_type": "llama4_text"} | fields)
