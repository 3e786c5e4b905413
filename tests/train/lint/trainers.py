"""transformers' own Mixtral and Trainer, as its users build them, and with our corrections."""

import tempfile
from typing import Any

import torch
from transformers import MixtralConfig, MixtralForCausalLM, Trainer, TrainingArguments

from moesaic.hub.transformers import correct_balance_loss, use_moesaic_experts

LENGTH, ROWS = 16, 4


def mixtral(**fields: Any) -> MixtralForCausalLM:
    """Four layers of four experts, of which a token gets one."""
    torch.manual_seed(0)
    config = MixtralConfig(
        hidden_size=24,
        intermediate_size=40,
        num_local_experts=4,
        num_experts_per_tok=1,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        vocab_size=61,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        router_aux_loss_coef=0.01,
        **{"output_router_logits": True, **fields},
    )
    return MixtralForCausalLM(config)


def texts(number: int = 2 * ROWS) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(3, 61, (LENGTH,), generator=generator) for _ in range(number)]
    return [{"input_ids": row, "attention_mask": torch.ones_like(row), "labels": row} for row in rows]


def trainer_of(model: MixtralForCausalLM) -> Trainer:
    folder = tempfile.mkdtemp()
    settings = TrainingArguments(folder, per_device_train_batch_size=ROWS, use_cpu=True, report_to="none")
    return Trainer(model, settings, train_dataset=texts())  # pyright: ignore[reportArgumentType]


def plain() -> Trainer:
    """As it comes, with its balance loss on."""
    return trainer_of(mixtral())


def corrected() -> Trainer:
    """With our loss, and our experts."""
    return trainer_of(use_moesaic_experts(correct_balance_loss(mixtral())))


def silent() -> Trainer:
    """With a coefficient in its configuration and no loss computed: the default."""
    return trainer_of(mixtral(output_router_logits=False))
