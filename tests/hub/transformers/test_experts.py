"""Our experts give what transformers' own give: outputs, gradients, prompts and decoding."""

import pytest
import torch

from moesaic.errors import ConfigError
from moesaic.hub.transformers import use_moesaic_experts
from tests.hub.transformers.tiny import tiny_model, tokens

KINDS = ["mixtral", "qwen3_moe", "olmoe", "nemotron_h"]


def logits_of(model, implementation, ids, **more):
    model.set_experts_implementation(implementation)
    return model(ids, **more)


@pytest.mark.parametrize("kind", KINDS)
def test_logits_and_gradients_in_fp32(kind):
    model, ids = tiny_model(kind), tokens()
    found = {}
    for implementation in ("eager", "moesaic"):
        model.zero_grad()
        output = logits_of(model, implementation, ids, labels=ids)
        output.loss.backward()
        found[implementation] = (
            output.logits.detach(),
            {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None},
        )
    (logits, gradients), (own_logits, own_gradients) = found["eager"], found["moesaic"]
    assert (own_logits - logits).abs().max() <= 1e-5 * logits.abs().max()
    assert own_gradients.keys() == gradients.keys()
    for name, gradient in gradients.items():
        assert (own_gradients[name] - gradient).abs().max() <= 1e-5 * gradient.abs().max().clamp(min=1e-3), name


def test_decoding_gives_the_same_text_in_fp32_and_stays_close_in_bf16():
    model, ids = tiny_model(), tokens()
    texts = []
    for implementation in ("grouped_mm", "moesaic"):
        model.set_experts_implementation(implementation)
        texts.append(model.generate(ids, max_new_tokens=6, do_sample=False))
    assert torch.equal(*texts)
    exact = logits_of(model, "eager", ids).logits
    model.to(torch.bfloat16)
    errors = [(logits_of(model, name, ids).logits - exact).abs().max() for name in ("grouped_mm", "moesaic")]
    assert errors[1] <= 2 * errors[0]  # rounded like theirs; a mistake would be ten times that


def test_a_token_has_the_same_bits_whatever_else_is_in_the_batch():
    model, ids = use_moesaic_experts(tiny_model()), tokens(8)
    experts = model.model.layers[1].mlp.experts
    torch.manual_seed(0)
    x, weights = torch.randn(8, 24), torch.rand(8, 2)
    chosen = ids[:, :1] % 6 + torch.tensor([[0, 1]])
    chosen = chosen % 6
    together = experts(x, chosen, weights)
    for token in range(8):
        part = slice(token, token + 1)
        assert torch.equal(experts(x[part], chosen[part], weights[part]), together[part])


def bf16_valued(kind: str = "mixtral"):
    """A model in fp32 whose weights are all bf16 values, as released ones are."""
    return tiny_model(kind).bfloat16().float()


@pytest.mark.parametrize("kind", KINDS)
def test_narrow_experts_give_the_same_bits(kind):
    model, ids = use_moesaic_experts(bf16_valued(kind)), tokens()
    with torch.no_grad():
        wide, before = model(ids).logits, {name: weight.clone() for name, weight in model.state_dict().items()}
        use_moesaic_experts(model, narrow=True)
        assert torch.equal(model(ids).logits, wide)
        assert torch.equal(model(ids[:1, :1]).logits, use_moesaic_experts(bf16_valued(kind))(ids[:1, :1]).logits)
    narrow = {name for name, weight in model.state_dict().items() if weight.dtype == torch.bfloat16}
    assert narrow == {name for name in before if name.endswith(("experts.gate_up_proj", "experts.up_proj", "down_proj"))
                      and "experts." in name and "shared" not in name}  # fmt: skip
    assert model(ids).logits.requires_grad  # widened for a gradient's sake
    model.float()
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())
    model.set_experts_implementation("eager")
    assert (model(ids).logits - wide).abs().max() <= 1e-5 * wide.abs().max()


@pytest.mark.parametrize("value", [1 + 2**-20, float("nan")], ids=["finer", "no number"])
def test_a_tensor_with_another_value_stays_in_fp32(value):
    model = bf16_valued()
    experts = [layer.mlp.experts for layer in model.model.layers]
    with torch.no_grad():
        experts[1].down_proj[3, 5, 7] = value
    use_moesaic_experts(model, narrow=True)
    assert experts[1].down_proj.dtype == torch.float32 and experts[1].gate_up_proj.dtype == torch.bfloat16
    assert {expert.down_proj.dtype for expert in (experts[0], experts[2])} == {torch.bfloat16}
    own = use_moesaic_experts(tiny_model(), narrow=True)
    assert {weight.dtype for weight in own.parameters()} == {torch.float32}


def test_gradients_pass_through_narrow_experts():
    found = []
    for narrow in (False, True):
        model, ids = use_moesaic_experts(bf16_valued(), narrow=narrow), tokens()
        model(ids, labels=ids).loss.backward()
        found.append({name: weight.grad for name, weight in model.named_parameters() if "experts" not in name})
    assert all(torch.equal(gradient, found[1][name]) for name, gradient in found[0].items())


def test_choices_of_other_ranks_are_left_out():
    model = use_moesaic_experts(tiny_model())
    experts = model.model.layers[0].mlp.experts
    x, weights = torch.randn(3, 24), torch.rand(3, 2)
    here = experts(x, torch.tensor([[0, 1], [2, 3], [4, 5]]), weights * torch.tensor([[1.0, 0.0]]))
    experts._is_expert_parallel = True
    assert torch.equal(experts(x, torch.tensor([[0, 6], [2, 6], [4, 6]]), weights), here)


def test_nothing_is_kept_beside_the_weights():
    model, ids = use_moesaic_experts(tiny_model()), tokens()
    before = {name: weight.data_ptr() for name, weight in model.named_parameters()}
    with torch.no_grad():
        model(ids)
    assert {name: weight.data_ptr() for name, weight in model.named_parameters()} == before
    assert not any(isinstance(value, torch.Tensor) for module in model.modules() for value in vars(module).values())


def test_what_cannot_be_computed_is_refused():
    with pytest.raises(ConfigError, match=r"stores its weights \[experts, in, out\]"):
        use_moesaic_experts(tiny_model("gpt_oss"))
    with pytest.raises(ConfigError, match=r"torch.float16; moesaic computes float32 and bfloat16"):
        use_moesaic_experts(tiny_model().half())
    with pytest.raises(ConfigError, match="has no experts"):
        use_moesaic_experts(torch.nn.Linear(3, 5))
