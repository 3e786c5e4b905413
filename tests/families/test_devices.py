"""On a GPU every family's model says and writes what it says and writes on the CPU, and has the same gradients."""

from typing import Any

import torch
from torch import Tensor

from moesaic.engine.generate import generate
from moesaic.hub import load
from tests.families.decoder_oracle import gradient_ids, loss_of, padding_mask, token_ids
from tests.families.encoder_decoder_oracle import PAIR, padded
from tests.families.same import assert_same, assert_same_slopes


def gradients(model: Any, ids_BS: Tensor) -> dict[str, Tensor]:
    loss_of(model(ids_BS), ids_BS).backward()
    found = {name: parameter.grad for name, parameter in model.named_parameters()}
    return {name: gradient.cpu() for name, gradient in found.items() if gradient is not None}


@torch.no_grad()
def test_logits_and_texts(any_case: Any, gpu: torch.device) -> None:
    there = load(any_case.folder, device=gpu)
    assert {tensor.device.type for tensor in there.state_dict().values()} == {"cuda"}
    for mask_BS in (None, padding_mask("left")):
        here_BSV = any_case.ours(token_ids(), mask_BS)
        there_BSV = there(token_ids().to(gpu), None if mask_BS is None else mask_BS.to(gpu)).cpu()
        valid = slice(None) if mask_BS is None else mask_BS.bool()
        assert_same(there_BSV[valid], here_BSV[valid])
    if not there.config.leaks_future:
        prompts = [ids.tolist() for ids in (token_ids()[0], token_ids()[1, :5])]
        assert generate(there, prompts, 12) == generate(any_case.ours, prompts, 12)


def test_gradients(any_case: Any, gpu: torch.device) -> None:
    here, there = load(any_case.folder), load(any_case.folder, device=gpu)
    assert_same_slopes(gradients(there, gradient_ids().to(gpu)), gradients(here, gradient_ids()))


@torch.no_grad()
def test_pairs(oracle_of_pairs: Any, gpu: torch.device) -> None:
    there, here = load(oracle_of_pairs.folder, device=gpu), oracle_of_pairs.ours
    (source_BM, mask_BM), target_BS = padded(PAIR[0], "right", 0), PAIR[1]
    pair = (source_BM, target_BS, mask_BM)
    assert_same(there(*(tensor.to(gpu) for tensor in pair)).cpu(), here(*pair))
    sources = [ids.tolist() for ids in source_BM]
    if here.config.decoder_start_token_id is not None:
        assert generate(there, sources, 8) == generate(here, sources, 8)
