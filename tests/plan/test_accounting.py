"""Bytes, operations and messages against counts by hand and figures that makers publish."""

import numpy as np
import pytest

from moesaic import families
from moesaic.errors import ConfigError
from moesaic.plan import flops, formats, hardware, memory, network, routing
from moesaic.plan.kinds import with_shared_layers
from moesaic.plan.layout import Layout
from moesaic.plan.offload import hit_rate

DECODERS = [name for name in families.presets() if families.find_preset(name).encoder is None]


@pytest.mark.parametrize("name", DECODERS)
def test_operations_add_up_to_the_models_own_count(name: str) -> None:
    """One token reads every active weight once and multiplies it once, whatever operation it belongs to."""
    config = families.find_preset(name)
    step = flops.Step(kind="prefill", texts=1, new=1, context=64)
    ops = flops.step_ops(config, formats.named("bf16"), step)
    multiplied = sum(op.flops for op in ops if op.name not in ("norms", "attention"))
    assert multiplied == pytest.approx(2 * config.active_gemm, rel=4e-3)
    assert sum(op.weight_bytes for op in ops) == pytest.approx(2 * config.active_gemm, rel=4e-3)
    scores = next(op.flops for op in ops if op.name == "attention")
    assert scores == pytest.approx(config.decoder.score_flops(64))


@pytest.mark.parametrize(("name", "gib"), [("gpt-oss-120b", 60.8), ("gpt-oss-20b", 12.8)])
def test_checkpoints_are_as_large_as_published(name: str, gib: float) -> None:
    """gpt-oss model card: 60.8 GiB and 12.8 GiB."""
    found = formats.total_bytes(families.find_preset(name), formats.named("mxfp4")) / 2**30
    assert found == pytest.approx(gib, rel=0.005)


@pytest.mark.parametrize(
    ("name", "num_bytes"),
    [
        ("mixtral-8x7b", 131_072), ("mixtral-8x22b", 229_376), ("qwen3-30b-a3b", 98_304), ("deepseek-v3", 70_272),
        ("deepseek-v2-lite", 31_104), ("dbrx", 163_840), ("glm-4.5", 376_832), ("llama-2-70b", 327_680),
    ],
)  # fmt: skip
def test_cache_of_a_token(name: str, num_bytes: int) -> None:
    config = families.find_preset(name)
    assert formats.named("bf16").state_bytes(config, 1) == num_bytes


def test_latents_in_fp8_are_kept_as_deepseek_keeps_them() -> None:
    """512 + 4 scales of 4 bytes + 64 numbers of 2 (FlashMLA)."""
    attention = families.find_preset("deepseek-v3").layers[5].attention
    assert formats.layer_state_bytes(attention, 1, "fp8") == 656


@pytest.mark.parametrize(
    ("experts", "top_k", "counts"),
    [
        (8, 2, {1: 2, 4: 5.47, 16: 7.92}),
        (128, 8, {4: 29.1, 16: 82.4, 64: 125.9}),
        (256, 8, {4: 30.5, 16: 102.0, 64: 222.4, 256: 255.9}),
        (128, 4, {4: 15.3, 16: 51.0, 64: 111.2}),
    ],
)
def test_distinct_experts(experts: int, top_k: int, counts: dict[int, float]) -> None:
    for batch, expected in counts.items():
        assert routing.distinct_experts(experts, top_k, batch) == pytest.approx(expected, abs=0.06)
    drawn = np.random.default_rng(0)
    order = drawn.random((400, 7, experts)).argpartition(top_k, axis=2)[:, :, :top_k].reshape(400, -1)
    hits = [len(np.unique(row)) for row in order]
    assert np.mean(hits) == pytest.approx(routing.distinct_experts(experts, top_k, 7), rel=0.02)
    skewed = drawn.dirichlet(np.full(experts, 0.3)) * top_k
    shares = np.minimum(skewed, 1.0)
    assert routing.distinct_by_shares(shares, 7) < routing.distinct_experts(experts, top_k, 7)


def test_messages_of_deepseek_v3() -> None:
    """A token needs 5.29 of 8 nodes, limited to 4: 4 * 7168 * (1.03 + 2) bytes a layer (arXiv:2412.19437, sec. 3.2)."""
    config = families.find_preset("deepseek-v3")
    moe = config.layers[5].feed_forward
    assert network.distinct_places(8, 256, 8) == pytest.approx(5.295, abs=1e-3)
    sent = sum(network.all_to_all(moe, 7168, 1, 64, 8, size).network_bytes for size in (1 + 4 / 128, 2.0))  # pyright: ignore[reportArgumentType]
    assert sent == pytest.approx(4 * 7 / 8 * 7168 * (1 + 4 / 128 + 2), rel=1e-6)  # one of eight nodes is its own


def test_devices_hold_all_of_a_model_between_them() -> None:
    config = with_shared_layers(families.find_preset("mixtral-8x7b"))
    packed = formats.named("bf16")
    whole = formats.total_bytes(config, packed)
    for layout in (Layout(tp=8, ep=8), Layout(tp=4, dp=2, ep=8), Layout(tp=2, etp=2)):
        held = memory.device_weights(config, packed, layout)
        copied = sum(size for role, size in held.items() if role in ("norm", "router"))
        split = sum(held.values()) - copied
        dense = sum(size for role, size in held.items() if role not in ("norm", "router", "experts"))
        devices = layout.devices
        assert split * devices - dense * layout.tp * (layout.dp - 1) == pytest.approx(whole - copied, rel=1e-3)


def test_training_bytes_of_a_parameter() -> None:
    """bf16 weights 2, fp32 master 4, Adam 8, fp32 gradient 4: 18 bytes; ZeRO-1 splits 12 of them over copies."""
    config = families.find_preset("qwen3-0.6b")
    device = hardware.find_device("h100")
    alone = memory.training_memory(config, memory.Training(), device).parts
    assert alone["weights"] + alone["gradients"] + alone["optimizer"] == pytest.approx(18 * config.total, rel=1e-6)
    copied = memory.training_memory(config, memory.Training(), device, Layout(dp=4)).parts
    assert copied["optimizer"] == pytest.approx(3 * config.total, rel=1e-6)
    recomputed = memory.training_memory(config, memory.Training(recompute="layers"), device).parts
    assert recomputed["activations"] == 2 * 28 * 4096 * config.hidden_size


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"ep": 3, "dp": 3}, "num_experts=8 does not divide over ep=3 devices; use 1, 2, 4 or 8"),
        ({"tp": 3}, "tp=3 does not divide 32 heads"),
        ({"ep": 4}, r"ep=4 times etp=1 does not divide the 1 devices"),
        ({"pp": 64}, "pp=64 is more than the model's 32 layers"),
    ],
)
def test_layouts_that_do_not_divide(settings: dict[str, int], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        Layout(**settings).check(families.find_preset("mixtral-8x7b"))


def test_hit_rates() -> None:
    """Che's approximation against a cache that is really kept, and the order of policies."""
    generator = np.random.default_rng(0)
    shares = np.r_[np.full(4, 0.6), np.full(28, 1.6 / 28)]
    kept: list[int] = []
    hits = 0
    drawn = generator.choice(32, 20_000, p=shares / shares.sum())
    for expert in drawn:
        hits += expert in kept
        kept = [int(expert), *(each for each in kept if each != expert)][:8]
    assert hit_rate(shares, 8, "lru") == pytest.approx(hits / len(drawn), abs=0.02)
    assert hit_rate(shares, 8, "random") < hit_rate(shares, 8, "lru") < hit_rate(shares, 8, "static")
    assert hit_rate(shares, 32) == 1.0
