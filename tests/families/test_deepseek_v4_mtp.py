"""DeepSeek-V4's further tokens: transformers has no such layers, but all that they are made of."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from moesaic.hub import load
from moesaic.layers.kv_cache import KeyValueCache
from moesaic.routing import RoutingTape
from moesaic.train.loss import losses
from tests.families.v4 import AHEAD, changed, close, decoder, folder_of, token_ids


def alone(folder: Path, depth: int, tmp_path: Path) -> Any:
    """A transformers model whose only layer is the one of this depth, with its own norm and join, without its begin."""
    raw = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    kind = "compressed_sparse_attention" if raw["compress_ratios"][2 + depth] else "sliding_attention"
    one = {"num_hidden_layers": 1, "num_hash_layers": 0, "layer_types": [kind], "mlp_layer_types": ["moe"]}
    prefix, shared = f"mtp.{depth - 1}.", ("embed.weight", "head.weight")
    outer = ("norm.", "hc_head_")
    tensors = load_file(folder / "model.safetensors")
    own = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    kept = {name if name.startswith(outer) else f"layers.0.{name}": tensor for name, tensor in own.items()}
    begin = ("layers.0.enorm.", "layers.0.hnorm.", "layers.0.e_proj.", "layers.0.h_proj.")
    kept = {name: tensor for name, tensor in kept.items() if not name.startswith(begin)}
    out = tmp_path / f"depth{depth}"
    out.mkdir()
    del raw["compress_ratios"]
    (out / "config.json").write_text(json.dumps(raw | one), encoding="utf-8")
    save_file(kept | {name: tensors[name] for name in shared}, out / "model.safetensors", metadata={"format": "pt"})
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        out, attn_implementation="eager", experts_implementation="eager", output_loading_info=True
    )
    theirs, report = loaded
    assert not report["missing_keys"] and not report["unexpected_keys"]
    return theirs.eval()


@torch.no_grad()
def test_further_tokens_by_the_equations(made: Callable[[str], Any], tmp_path: Path) -> None:
    """x = e_proj norm(embedding of the next token) + h_proj norm(each stream), a layer, its own join and norm."""
    folder, ids_BS = folder_of(made, AHEAD), token_ids()
    model, tensors = decoder(folder), load_file(folder / "model.safetensors")

    def rms(x: Tensor, name: str) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * tensors[f"{name}.weight"]

    streams = model.carried(ids_BS)
    assert close(model.logits(model.before_head(streams)), model(ids_BS))
    for depth in (1, 2):
        prefix, places = f"mtp.{depth - 1}", ids_BS.shape[1] - depth
        next_ids = ids_BS[:, depth:]
        embedded = rms(tensors["embed.weight"][next_ids], f"{prefix}.enorm") @ tensors[f"{prefix}.e_proj.weight"].T
        projected = rms(streams[:, :places], f"{prefix}.hnorm") @ tensors[f"{prefix}.h_proj.weight"].T
        theirs = alone(folder, depth, tmp_path)
        begin = embedded[:, :, None] + projected
        kept: list[Tensor] = []
        theirs.model.layers[0].register_forward_pre_hook(lambda _, args, begin=begin: (begin, *args[1:]))
        theirs.model.layers[0].register_forward_hook(lambda _m, _a, out, kept=kept: kept.append(out))
        expected = theirs(next_ids).logits
        streams = model.hidden_ahead(streams[:, :places], next_ids, depth=depth)
        assert streams.shape == (2, places, 3, 48) and close(streams, kept[0])
        assert close(model.logits(model.before_head(streams, depth=depth)), expected)


@torch.no_grad()
@pytest.mark.parametrize("chunks", [[1] * 12, [5, 1, 6]])
def test_further_tokens_with_a_cache(made: Callable[[str], Any], chunks: list[int]) -> None:
    model, ids_BS = decoder(folder_of(made, AHEAD)), token_ids()
    streams = model.carried(ids_BS)[:, :-1]
    expected = model.hidden_ahead(streams, ids_BS[:, 1:], depth=1)
    cache = KeyValueCache(model.config, batch_size=2, max_length=12, layers=model.config.mtp[:1])
    parts = zip(streams.split(chunks, 1), ids_BS[:, 1:].split(chunks, 1), strict=True)
    assert close(torch.cat([model.hidden_ahead(*part, depth=1, cache=cache) for part in parts], 1), expected)


def test_they_learn(made: Callable[[str], Any]) -> None:
    """What training adds is the cross-entropy of these logits, and every weight of these layers has a gradient."""
    model, ids_BS = decoder(folder_of(made, AHEAD)), token_ids(14)
    inputs_BS, targets_BS = ids_BS[:, :-1], ids_BS[:, 1:]
    seen = losses(model, inputs_BS, targets_BS, [], RoutingTape(), mtp_coefficient=0.5)
    carried = model.carried(inputs_BS)
    for depth, loss in enumerate(seen.mtp, 1):
        carried = model.hidden_ahead(carried[:, :-1], inputs_BS[:, depth:], depth=depth)
        logits_BSV = model.logits(model.before_head(carried, depth=depth))
        summed = torch.nn.functional.cross_entropy(
            logits_BSV.flatten(0, 1), targets_BS[:, depth:].flatten(), reduction="sum"
        )
        assert close(loss, summed / targets_BS.numel())
    assert close(seen.prediction, seen.cross_entropy + 0.5 * (seen.mtp[0] + seen.mtp[1]) / 2)
    seen.total.backward()
    still = [name for name, each in model.named_parameters() if name.startswith("mtp.") and each.grad is None]
    assert all(".indexer." in name for name in still), "what only chooses has none"


def test_files_of_transformers_lack_them_and_are_read_without(made: Callable[[str], Any], tmp_path: Path) -> None:
    folder = folder_of(made, AHEAD)
    without = changed(folder, tmp_path / "m", lambda t: [t.pop(name) for name in [*t] if name.startswith("mtp.")])
    seen, expected = load(without), load(folder)
    assert seen.config == dataclasses.replace(expected.config, mtp=())
    assert torch.equal(seen(token_ids()), expected(token_ids()))
