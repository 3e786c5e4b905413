"""transformers' own encoder-decoders, tiny, with what they lack or get wrong put right, and what they are asked."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from types import MethodType
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForSeq2SeqLM, T5Config
from transformers.models.switch_transformers import modeling_switch_transformers as their_switch
from transformers.models.t5.modeling_t5 import T5DenseGatedActDense

from tests.families.decoder_oracle import loaded, loss_of, padding_mask, put_gradients_in, slopes_of
from tests.families.encoder_decoder_cases import CASES, NOT_LOADED_BY_THEM, SHARE_COUNTS_PADDING, THEIR_NAMES

FIRST_WORD = 6  # ids below it are special in some case


def words(*shape: int, seed: int = 3) -> Tensor:
    """Token ids, none of them special."""
    return torch.randint(FIRST_WORD, 131, shape, generator=torch.Generator().manual_seed(seed))


# Ids of sources and targets.
PAIR = words(3, 15), words(3, 11, seed=4)
LONG = words(2, 40), words(2, 33, seed=4)  # more tokens than slots, and distances beyond the last bucket
ROW = words(1, 15), words(1, 11, seed=4)
SLOPING = words(3, 15, seed=9), words(3, 13, seed=10)
CHOOSING = words(4, 17), words(4, 19, seed=5)
PARTS = words(3, 15), words(3, 13, seed=4)  # of which the target comes in chunks
CHUNKS = {"one by one": [1] * 13, "in chunks": [5, 1, 1, 6]}


def padded(ids: Tensor, side: str, pad_id: int) -> tuple[Tensor, Tensor]:
    """Ids of three rows, of which the second and third are shorter, and their mask."""
    mask = padding_mask(side, ids.shape[1])
    return ids.masked_fill(mask == 0, pad_id), mask


def save_new(case: str, folder: Path) -> None:
    """A checkpoint of a case, as transformers writes it; its values are any."""
    family, fields, gated = case.partition("/")[0], CASES[case], case in NOT_LOADED_BY_THEM
    plain = fields | {"dense_act_fn": "relu"} if gated else fields
    config = AutoConfig.for_model(THEIR_NAMES.get(family, family), **plain)
    model: Any = AutoModelForSeq2SeqLM.from_config(config)
    if gated:
        _put_gates_in(model)
    model.save_pretrained(folder)
    if gated:
        saved = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(saved | {"dense_act_fn": "gated-gelu"}))


def their_model(case: str, folder: Path) -> Any:
    """With NLLB's experts as they should be."""
    if case not in NOT_LOADED_BY_THEM:
        model = loaded(AutoModelForSeq2SeqLM, folder)
    else:
        config = AutoConfig.from_pretrained(folder, dense_act_fn="relu")
        model = AutoModelForSeq2SeqLM.from_config(config, attn_implementation="eager").eval()
        _put_gates_in(model)
        model.load_state_dict(load_file(folder / "model.safetensors"))
    for module in model.modules():
        if type(module).__name__ == "NllbMoeExperts":
            module.forward = MethodType(experts_as_chosen, module)
    return model


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


def _tables(model: Any) -> list[Any]:
    """Those of embeddings: with the authors one; in transformers 5 three where the head has its own."""
    inner = getattr(model, "model", model)
    tables = (inner.shared.weight, inner.encoder.embed_tokens.weight, inner.decoder.embed_tokens.weight)
    return list({id(table): table for table in tables}.values())


def num_learned(model: Any) -> int:
    """How many parameters a transformers model learns, one table of embeddings counted."""
    copies = sum(table.numel() for table in _tables(model)[1:])
    return sum({id(parameter): parameter.numel() for parameter in model.parameters()}.values()) - copies


@torch.no_grad()
def their_logits(model: Any, source: Tensor, target: Tensor, **masks: Tensor) -> Tensor:
    return model(input_ids=source, decoder_input_ids=target, use_cache=False, **masks).logits


def _logits_of_tokens(model: Any, case: str, side: str) -> Tensor:
    """Switch's rows alone, for transformers' padding on the left takes up slots; NLLB's slots are the whole batch's."""
    source, source_mask = padded(words(3, 15), side, model.config.pad_token_id)
    target, mask = padded(words(3, 13, seed=4), side, model.config.pad_token_id)
    if case.startswith("nllb_moe/"):
        return their_logits(model, source, target, attention_mask=source_mask, decoder_attention_mask=mask)[mask.bool()]
    rows = zip(source, source_mask.bool(), target, mask.bool(), strict=True)
    return torch.cat([their_logits(model, ids[kept][None], own[held][None])[0] for ids, kept, own, held in rows])


@torch.no_grad()
def _logits_of_chunks(model: Any, chunks: list[int]) -> Tensor:
    source, target = PARTS
    past, memory, seen = None, model.get_encoder()(source), []
    for part in target.split(chunks, dim=1):
        out = model(encoder_outputs=memory, decoder_input_ids=part, past_key_values=past, use_cache=True)
        past = out.past_key_values
        seen.append(out.logits)
    return torch.cat(seen, dim=1)


@torch.no_grad()
def _weights(model: Any) -> Tensor:
    """The weight of every expert for every token [T, E], 0 where it has none, of one MoE layer after the other."""
    heard: list[Tensor] = []

    def hear(_module: Any, _args: Any, out: Any) -> None:
        first, second = out[0], out[1]  # Switch: choices and the chosen weights; NLLB: first choices and all weights
        weights = second if second.shape == first.shape else first * second
        heard.append(weights.reshape(-1, weights.shape[-1]))

    hooks = [module.register_forward_hook(hear) for name, module in model.named_modules() if name.endswith(".router")]
    source, target = CHOOSING
    model(input_ids=source, decoder_input_ids=target)
    for hook in hooks:
        hook.remove()
    return torch.cat(heard)


def sources(case: str, pad_id: int) -> tuple[Tensor, Tensor]:
    """Of three lengths, where padding changes nothing."""
    if case in SHARE_COUNTS_PADDING:
        return words(3, 15), torch.ones(3, 15, dtype=torch.long)
    return padded(words(3, 15), "right", pad_id)


def prefix(case: str) -> list[int]:
    """The language that NLLB is told first, where the batch's tokens share no slots: these are those of one pass, and
    transformers takes two for what the target begins with."""
    fields = CASES[case]
    is_limited = fields.get("moe_eval_capacity_token_fraction", 1.0) != 1.0
    return [77] if case.startswith("nllb_moe/") and not is_limited else []


def _greedy(model: Any, case: str) -> Tensor:
    """[3, up to 12] token ids, without what the target begins with."""
    source, mask = sources(case, model.config.pad_token_id)
    told = prefix(case)
    written = model.generate(
        input_ids=source,
        attention_mask=mask,
        max_new_tokens=12 + len(told),
        do_sample=False,
        num_beams=1,
        decoder_start_token_id=model.generation_config.decoder_start_token_id,
        forced_bos_token_id=told[0] if told else None,
    )
    return written[:, 1 + len(told) :].to(torch.uint8)


def save_their_gradients(model: Any, folder: Path) -> None:
    """A checkpoint of gradients: they go the way of weights."""
    source, target = SLOPING
    twin = copy.deepcopy(model)
    loss_of(twin(input_ids=source, decoder_input_ids=target).logits, target).backward()
    tables = _tables(twin)
    summed = torch.stack([table.grad for table in tables if table.grad is not None]).sum(0)
    for table in tables:
        table.grad = summed
    put_gradients_in(twin)
    twin.save_pretrained(folder)


# What a model of a case is asked. The answers about logits have their columns last.
QUESTIONS: dict[str, Callable[[Any, str], Tensor]] = {
    "logits": lambda model, case: their_logits(model, *PAIR),
    "logits, long": lambda model, case: their_logits(model, *LONG),
    "logits, one row": lambda model, case: their_logits(model, *ROW),
    "logits, padded left": lambda model, case: _logits_of_tokens(model, case, "left"),
    "logits, padded right": lambda model, case: _logits_of_tokens(model, case, "right"),
    "logits, whole": lambda model, case: their_logits(model, *PARTS),
    **{f"logits, {how}": lambda model, case, how=how: _logits_of_chunks(model, CHUNKS[how]) for how in CHUNKS},
    "weights": lambda model, case: _weights(model),
    "greedy": lambda model, case: _greedy(model, case),
    "slopes": lambda model, case: slopes_of(lambda folder: save_their_gradients(model, folder)),
}
