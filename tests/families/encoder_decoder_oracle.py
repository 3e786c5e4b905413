"""transformers' own encoder-decoders, tiny, with what they lack or get wrong put right."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForSeq2SeqLM, T5Config
from transformers.models.switch_transformers import modeling_switch_transformers as their_switch
from transformers.models.t5.modeling_t5 import T5DenseGatedActDense

from tests.families.encoder_decoder_cases import CASES, NOT_LOADED_BY_THEM, SHARE_COUNTS_PADDING, THEIR_NAMES

PAD, FIRST_WORD = 1, 6  # ids below FIRST_WORD are special in some case


class Seq2SeqOracle(NamedTuple):
    """A transformers model and the folder that it is saved in; see the cases' lists for the others."""

    model: Any
    folder: Path
    loaded_by_them: bool
    share_counts_padding: bool

    @property
    def pad_id(self) -> int:
        return self.model.config.pad_token_id


def make(case: str, folder: Path, **changes: Any) -> Seq2SeqOracle:
    """A model with weights of std 0.2, saved to `folder`.

    Embeddings have 1 where logits are divided. Queries have less where scores are not: a sharp softmax magnifies
    rounding errors.
    """
    family, fields = case.partition("/")[0], CASES[case] | changes
    gated = fields.get("dense_act_fn") == "gated-gelu"
    plain = fields | {"dense_act_fn": "relu"} if gated else fields
    config = AutoConfig.for_model(THEIR_NAMES.get(family, family), **plain)
    torch.manual_seed(7)
    model: Any = AutoModelForSeq2SeqLM.from_config(config, attn_implementation="eager").eval()
    if gated:
        _put_gates_in(model)
    stds = {"Attention.q.": 0.06}
    if family == "switch_transformers" and config.tie_word_embeddings:
        stds["shared"] = 1.0
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            std = next((std for part, std in stds.items() if part in name), 0.2)
            parameter.normal_(float("norm.weight" in name), std)
        for table in _tables(model)[1:]:
            table.copy_(_tables(model)[0])
    model.save_pretrained(folder)
    if gated:
        saved = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(saved | {"dense_act_fn": "gated-gelu"}))
    return Seq2SeqOracle(model, folder, case not in NOT_LOADED_BY_THEM, case in SHARE_COUNTS_PADDING)


def _tables(model: Any) -> list[Any]:
    """Those of embeddings: with the authors one; in transformers 5 three where the head has its own."""
    inner = getattr(model, "model", model)
    tables = (inner.shared.weight, inner.encoder.embed_tokens.weight, inner.decoder.embed_tokens.weight)
    return list({id(table): table for table in tables}.values())


def num_learned(model: Any) -> int:
    """How many parameters a transformers model learns, one table of embeddings counted."""
    copies = sum(table.numel() for table in _tables(model)[1:])
    return sum({id(parameter): parameter.numel() for parameter in model.parameters()}.values()) - copies


def put_gradients_in(model: Any) -> None:
    """Each parameter becomes its gradient; tables of embeddings the sum of theirs."""
    with torch.no_grad():
        slopes = [table.grad for table in _tables(model) if table.grad is not None]
        for table in _tables(model):
            table.grad = torch.stack(slopes).sum(0)
        for parameter in model.parameters():
            parameter.copy_(torch.zeros_like(parameter) if parameter.grad is None else parameter.grad)


def _put_gates_in(model: Any) -> None:
    """T5's own gated blocks in the place of all blocks, which is what the authors' code computes for Switch-XXL."""
    config = T5Config(d_model=model.config.d_model, d_ff=model.config.d_ff)
    config.dense_act_fn = "gelu_new"
    blocks = [
        (parent, name)
        for parent in model.modules()
        for name, child in parent.named_children()
        if isinstance(child, their_switch.SwitchTransformersDenseActDense)
    ]
    for parent, name in blocks:
        parent.register_module(name, T5DenseGatedActDense(config).eval())


def experts_as_chosen(self: Any, hidden_states: Tensor, router_mask: Tensor, router_probs: Tensor) -> Tensor:
    """What transformers' NLLB experts should compute (as in its version 4): each token by those with a weight for it.

    Version 5.23 takes `router_mask`, which is 1 at the first choice and else 0, for the ids of experts.
    """
    out = torch.zeros_like(hidden_states)
    for expert in range(self.num_experts):
        tokens = router_probs[:, expert].nonzero()[:, 0]
        own = self[f"expert_{expert}"](hidden_states[tokens]) * router_probs[tokens, expert, None]
        out = out.index_add(0, tokens, own * (1 - self.moe_token_dropout))
    return out


def words(*shape: int, seed: int = 3) -> Tensor:
    """Token ids, none of them special."""
    return torch.randint(FIRST_WORD, 131, shape, generator=torch.Generator().manual_seed(seed))


def padded(ids: Tensor, side: str, pad_id: int) -> tuple[Tensor, Tensor]:
    """Ids of three rows, of which the second and third are shorter, and their mask."""
    mask = torch.ones_like(ids)
    for row, padding in enumerate((0, 2, 6)):
        if padding:
            mask[row, slice(0, padding) if side == "left" else slice(-padding, None)] = 0
    return ids.masked_fill(mask == 0, pad_id), mask
