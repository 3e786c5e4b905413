"""Claims about memory: parameters, bits, caches."""

from collections.abc import Iterator

from moesaic import families
from moesaic.config import ModelConfig
from moesaic.families import _counted
from moesaic.plan.claims.claim import GIB, Claim
from moesaic.plan.formats import PACKINGS, named, weight_bytes
from moesaic.plan.hardware import find_machine
from moesaic.plan.memory import RUNTIME_BYTES


def claims() -> Iterator[Claim]:
    """All of this room."""
    mixtral, v3 = families.find_preset("mixtral-8x7b"), families.find_preset("deepseek-v3")
    yield _four_bits(mixtral)
    yield _eight_bits(mixtral)
    yield from _sixteen_bits(mixtral)
    yield _four_h100(v3)
    yield _one_node(v3)
    yield _active_is_memory(mixtral)
    yield _latent_cache(v3)
    yield _sparsity()


def _room(machine: str) -> float:
    """GiB for weights and caches: of all devices, less what their programs take."""
    found = find_machine(machine)
    return (found.memory_bytes - found.count * RUNTIME_BYTES[found.device.kind]) / GIB


def _size(model: ModelConfig, bits: float) -> float:
    """GiB of all weights at so many bits each."""
    return model.total * bits / 8 / GIB


def _cache(model: ModelConfig, tokens: int) -> float:
    """GiB of one text's cache in 16 bits."""
    return model.state_bytes(tokens) / GIB


def _longest(model: ModelConfig, room: float) -> int:
    """Tokens of cache in so many GiB."""
    return max(0, int(room * GIB / model.state_bytes(1)))


def _four_bits(model: ModelConfig) -> Claim:
    room, bits = _room("rtx4090"), PACKINGS["int4"].bits
    most = (room - _cache(model, 4096)) * GIB * 8 / model.total
    return Claim(
        "Mixtral 8x7B runs in 24 GB at 4 bits.",
        "false",
        "parameters x bits / 8 + cache <= memory - what the programs take",
        f"46.7B x {bits} / 8 = {_size(model, bits):.1f} GiB, and 4,096 tokens of cache {_cache(model, 4096):.1f} GiB; "
        f"there are {room:.1f} of 24 GiB",
        f"Formats called 4 bits hold scales, too, and take 4.25 to 4.8; {most:.2f} bits with all scales would just "
        "fit. "
        "A part of the experts must stay in the host's memory.",
    )


def _eight_bits(model: ModelConfig) -> Claim:
    room, bits = _room("2xrtx4090"), PACKINGS["int8"].bits
    left = room - _size(model, 8)
    return Claim(
        "Mixtral 8x7B runs on two 24 GB cards at 8 bits.",
        "it depends",
        "parameters x bits / 8 + cache <= memory - what the programs take",
        f"at 8.0 bits {_size(model, 8):.1f} GiB, at {bits} (a 16-bit scale for 32 weights) {_size(model, bits):.1f}; "
        "there "
        f"are {room:.1f} of 48 GiB",
        f"With a scale a row it fits, and {left:.1f} GiB are left for {_longest(model, left):,} tokens of cache; with "
        "scales in blocks of 32 (Q8_0) it does not.",
    )


def _sixteen_bits(model: ModelConfig) -> Iterator[Claim]:
    size = model.total * 2 / 1e9
    formula = "parameters x 2 bytes"
    numbers = f"{model.total:,} x 2 = {size:.1f} GB = {size * 1e9 / GIB:.1f} GiB"
    cache = model.state_bytes(32768) / 1e9
    yield Claim(
        "Mixtral 8x7B needs 90 GB at 16 bits.",
        "false",
        formula,
        numbers,
        f"{size / 90 - 1:.1%} too little for the weights alone, and a text of 32K tokens adds {cache:.1f} GB.",
    )
    yield Claim(
        "Mixtral 8x7B needs 95 GB at 16 bits.",
        "true",
        formula,
        numbers,
        f"The weights fit, with {95 - size:.1f} GB left for {(95 - size) * 1e9 / model.state_bytes(1):,.0f} tokens.",
    )


def _four_h100(model: ModelConfig) -> Claim:
    size = sum(weight_bytes(model.parameters(), named("fp8")).values()) / GIB
    return Claim(
        "DeepSeek-V3 runs on four H100 at FP8.",
        "false",
        "parameters x bits / 8 <= memory - what the programs take",
        f"671B in FP8 blocks, tables in 16 bits: {size:.0f} GiB; four H100 have {_room('4xh100'):.0f} GiB",
        f"It is {size / _room('4xh100'):.1f} times what they hold. Eight have {_room('8xh100'):.0f} GiB, so that no "
        "room "
        f"for caches is left; 16 H100 or 8 H200 ({_room('8xh200'):,.0f} GiB) serve it.",
    )


def _one_node(model: ModelConfig) -> Claim:
    room, bits = _room("8xh100"), PACKINGS["int4"].bits
    left = room - _size(model, bits)
    return Claim(
        "DeepSeek-V3 runs on one node of 8 GPUs at 4 bits.",
        "true",
        "parameters x bits / 8 + cache <= memory - what the programs take",
        f"671B x {bits} / 8 = {_size(model, bits):.0f} GiB; eight H100 have {room:.0f} GiB",
        f"{left:.0f} GiB are left: {_longest(model, left) / 1e6:.1f}M tokens of latent cache where each GPU keeps "
        "its own "
        "texts', an eighth of that where all keep all.",
    )


def _active_is_memory(model: ModelConfig) -> Claim:
    active, total = model.active_all, model.total
    return Claim(
        "A model with 13B active parameters needs the memory of a 13B model (Mixtral 8x7B).",
        "false",
        "memory: total parameters; operations of a token: active ones",
        f"active {active * 2 / 1e9:.1f} GB at 16 bits, total {total * 2 / 1e9:.1f} GB",
        f"It needs {total / active:.1f} times that: any token may choose any expert.",
    )


def _latent_cache(model: ModelConfig) -> Claim:
    attention = model.layers[-1].attention
    naive = 2 * 2 * len(model.layers) * model.hidden_size
    expanded = 2 * len(model.layers) * attention.num_heads * (192 + 128)
    own = model.state_bytes(1)
    return Claim(
        "The cache of a token takes 2 x layers x hidden size numbers (DeepSeek-V3).",
        "false",
        "MLA keeps a latent of 512 and a key of 64 numbers a layer",
        f"61 x (512 + 64) x 2 = {own:,} bytes; the claim's formula {naive:,}; all heads' keys and values {expanded:,}",
        f"The formula of multi-head attention is {naive / own:.0f} times too much, expanded heads would be "
        f"{expanded / own:.0f} times.",
    )


def _sparsity() -> Claim:
    models = {name: families.find_preset(name) for name in families.presets()}
    counted = {name: _counted.count(preset.config) for name, preset in _counted.PRESETS.items()}
    shares = {
        name: model.active_all / model.total
        for name, model in (models | counted).items()
        if model.active_all < model.total
    }
    within = sum(0.05 <= share <= 0.15 for share in shares.values())
    lowest, highest = min(shares, key=lambda name: shares[name]), max(shares, key=lambda name: shares[name])
    return Claim(
        "An MoE uses 5 % to 15 % of its parameters for a token.",
        "false",
        "active / total parameters",
        f"{within} of the {len(shares)} MoE presets; the least {lowest} {shares[lowest]:.1%}, the most {highest} "
        f"{shares[highest]:.1%}; Mixtral 8x7B {shares['mixtral-8x7b']:.1%}, DeepSeek-V3 {shares['deepseek-v3']:.1%}, "
        f"Kimi-K2 {shares['kimi-k2']:.1%}, gpt-oss-120b {shares['gpt-oss-120b']:.1%}",
        "Most do not: early and small ones use more, the largest ones less.",
    )
