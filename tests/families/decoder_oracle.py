"""transformers' own decoders, tiny, and what they are asked: by the script that keeps the answers and by slow tests."""

import copy
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from tests.families.cases import ALONE, CASES, COMMON
from tests.families.golden import slopes


def token_ids(batch: int = 3, length: int = 13) -> Tensor:
    return torch.randint(131, (batch, length), generator=torch.Generator().manual_seed(3))


def gradient_ids() -> Tensor:
    """Without the ids of padding, at which their embedding has no gradient. With these nothing that is cut off or
    clamped stands within a rounding error of its edge."""
    return torch.randint(4, 131, (3, 13), generator=torch.Generator().manual_seed(10))


def choice_ids() -> Tensor:
    return torch.randint(131, (4, 17), generator=torch.Generator().manual_seed(6))


def padding_mask(side: str, length: int = 13) -> Tensor:
    """Of three rows, of which the second and third are shorter."""
    mask_BS = torch.ones(3, length, dtype=torch.long)
    for row, padding in enumerate((0, 2, 6)):
        if padding:
            mask_BS[row, slice(0, padding) if side == "left" else slice(-padding, None)] = 0
    return mask_BS


def loss_of(logits_BSV: Tensor, ids_BS: Tensor) -> Tensor:
    return torch.nn.functional.cross_entropy(logits_BSV[:, :-1].flatten(0, 1), ids_BS[:, 1:].flatten())


def save_new(case: str, folder: Path) -> None:
    """A checkpoint of a case, as transformers writes it; its values are any."""
    config = AutoConfig.for_model(case.partition("/")[0], **COMMON | CASES[case])
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)


def their_model(case: str, folder: Path) -> Any:
    return loaded(AutoModelForCausalLM, folder, experts_implementation="eager")


def loaded(auto_class: Any, folder: Path, **options: Any) -> Any:
    """transformers' model of a folder that has all its tensors and no others."""
    transformers.utils.logging.disable_progress_bar()
    model, report = auto_class.from_pretrained(
        folder, attn_implementation="eager", output_loading_info=True, dtype="auto", **options
    )
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    return model.eval()


def num_learned(model: Any) -> int:
    """All parameters, less the selection biases, which no gradient reaches: ERNIE's are parameters, others' buffers."""
    biases = [each for name, each in model.named_parameters() if name.endswith("e_score_correction_bias")]
    return model.num_parameters() - sum(bias.numel() for bias in biases)


@torch.no_grad()
def their_logits(model: Any, ids_BS: Tensor, mask_BS: Tensor | None = None) -> Tensor:
    if mask_BS is None:
        return model(input_ids=ids_BS).logits
    positions_BS = (mask_BS.cumsum(1) - 1).clamp(min=0)
    return model(input_ids=ids_BS, attention_mask=mask_BS, position_ids=positions_BS).logits


def _logits_of_tokens(model: Any, case: str, side: str) -> Tensor:
    """Those beside padding, or of each row without it where their padding is no padding (see ALONE)."""
    ids_BS, mask_BS = token_ids(), padding_mask(side)
    if case not in ALONE:
        return their_logits(model, ids_BS, mask_BS)[mask_BS.bool()]
    rows = zip(ids_BS, mask_BS.bool(), strict=True)
    return torch.cat([their_logits(model, row[kept][None])[0] for row, kept in rows])


@torch.no_grad()
def their_choices(model: Any, ids_BS: Tensor) -> list[Tensor]:
    """The expert ids [T, K] of each MoE layer, as its experts are told them.

    Llama 4's experts are told nothing: there the ids are those of the router's scores that are not zero.
    """
    heard: list[Tensor] = []

    def hear_experts(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        told = (each for each in (*args, *kwargs.values()) if isinstance(each, Tensor))
        heard.extend(each for each in told if not each.is_floating_point())

    def hear_scores(_: Any, args: tuple[Any, ...], out: Any) -> None:
        scores_TE = out[0]
        heard.append(scores_TE.nonzero()[:, 1].view(len(scores_TE), -1))

    hooks = []
    for name, module in model.named_modules():
        if type(module).__name__ == "Llama4Router":
            hooks.append(module.register_forward_hook(hear_scores))
        elif name.endswith(".experts"):
            hooks.append(module.register_forward_pre_hook(hear_experts, with_kwargs=True))
    try:
        model(input_ids=ids_BS)
    finally:
        for hook in hooks:
            hook.remove()
    return [ids.reshape(-1, ids.shape[-1]) for ids in heard]


def _all_choices(model: Any) -> Tensor:
    """[L, T, K] of the MoE layers."""
    choices = their_choices(model, choice_ids())
    return torch.stack(choices).to(torch.uint8) if choices else torch.zeros(0, dtype=torch.uint8)


def save_their_gradients(model: Any, folder: Path) -> None:
    """A checkpoint of gradients: they go the way of weights."""
    twin, ids_BS = copy.deepcopy(model), gradient_ids()
    loss_of(twin(input_ids=ids_BS).logits, ids_BS).backward()
    put_gradients_in(twin)
    twin.save_pretrained(folder)


@torch.no_grad()
def put_gradients_in(model: torch.nn.Module) -> None:
    """Each parameter becomes its gradient, and what learns nothing zero."""
    for parameter in model.parameters():
        parameter.copy_(torch.zeros_like(parameter) if parameter.grad is None else parameter.grad)
    for buffer in model.buffers():
        if buffer.is_floating_point():
            buffer.zero_()


def slopes_of(save_gradients: Callable[[Path], object]) -> Tensor:
    """Those of the gradients that are saved to a folder."""
    with TemporaryDirectory() as folder:
        save_gradients(Path(folder))
        tensors = load_file(Path(folder) / "model.safetensors")
        return slopes({name: slope for name, slope in tensors.items() if slope.is_floating_point()})


# What a model of a case is asked. The answers about logits have their columns last.
QUESTIONS: dict[str, Callable[[Any, str], Tensor]] = {
    "logits": lambda model, case: their_logits(model, token_ids()),
    "logits, padded left": lambda model, case: _logits_of_tokens(model, case, "left"),
    "logits, padded right": lambda model, case: _logits_of_tokens(model, case, "right"),
    "choices": lambda model, case: _all_choices(model),
    "slopes": lambda model, case: slopes_of(lambda folder: save_their_gradients(model, folder)),
}
