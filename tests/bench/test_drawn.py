"""moesaic.bench.drawn: the tensors that a configuration describes, of the shapes that files would have."""

import torch

from moesaic import families
from moesaic.bench.drawn import DrawnWeights
from moesaic.models.init import initial_std

DEEPSEEK = {
    "model_type": "deepseek_v3", "vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "n_routed_experts": 8, "num_experts_per_tok": 2, "n_shared_experts": 1, "moe_intermediate_size": 16,
    "intermediate_size": 32, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1, "q_lora_rank": 16,
    "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8, "max_position_embeddings": 64,
    "num_nextn_predict_layers": 0, "routed_scaling_factor": 2.5,
}  # fmt: skip


def test_every_tensor_has_its_shape_and_scale():
    config = families.from_hf(DEEPSEEK)
    weights = DrawnWeights(config)
    for spec in config.tensors():
        tensor = weights.read(spec.name)
        assert tuple(tensor.shape) == spec.shape and tensor.dtype in (torch.bfloat16, torch.float32)
        if len(spec.shape) > 1 and spec.start is None:
            wanted = initial_std(spec, len(config.layers))
            assert 0.7 * wanted < tensor.float().std().item() < 1.3 * wanted, spec.name
    assert bool((weights.read("final_norm.weight") == 1).all())


def test_experts_are_drawn_one_by_one_and_again_alike():
    weights = DrawnWeights(families.from_hf(DEEPSEEK))
    first, second, again = (weights.read("layers.1.feed_forward.experts.down", expert) for expert in (0, 1, 0))
    assert first.shape == (32, 16)
    assert torch.equal(first, again) and not torch.equal(first, second)
