"""Claims about speed: what a step reads, and against which dense model."""

from collections.abc import Iterator

from moesaic import families
from moesaic.config import ModelConfig
from moesaic.plan.claims.claim import Claim
from moesaic.plan.dense import BATCHES, crossover, dense_equals
from moesaic.plan.formats import named
from moesaic.plan.hardware import find_device
from moesaic.plan.routing import distinct_experts

MODEL = "qwen3-30b-a3b"
CONTEXT = 2048
_SHOWN = (1, 16, 256, 4096)


def claims() -> Iterator[Claim]:
    """All of this room."""
    yield _dense_bytes()
    yield from _experts_read()
    yield from _against_dense(families.find_preset(MODEL))
    yield _generations()


def _dense_bytes() -> Claim:
    return Claim(
        "A dense model of 100B parameters reads 200 GB for each token at FP8.",
        "false",
        "parameters x bytes of a weight, once a step",
        "100B x 1 byte = 100 GB; 200 GB is what 16 bits take",
        "Twice too much; and a step reads them once for all texts of its batch, so each of 32 texts' tokens costs 3 "
        "GB.",
    )


def _experts_read() -> Iterator[Claim]:
    v3 = families.find_preset("deepseek-v3")
    router = v3.layers[-1].feed_forward.router  # pyright: ignore[reportAttributeAccessIssue]  DeepSeek-V3's are MoE
    experts, top_k = router.num_experts, router.top_k
    read = {batch: distinct_experts(experts, top_k, batch) for batch in (1, 16, 64, 256)}
    numbers = ", ".join(f"{batch}: {count:.0f}" for batch, count in read.items())
    formula = "E (1 - (1 - K/E)^B) distinct experts for B tokens"
    shown = f"DeepSeek-V3, {top_k} of {experts} a layer; batch and experts read: {numbers}"
    yield Claim(
        "A step reads all experts.",
        "false",
        formula,
        shown,
        f"One token reads {top_k / experts:.1%} of them; from some {experts * 4 // top_k} tokens on it is nearly true.",
    )
    yield Claim(
        "A step reads only the active experts, at any batch.",
        "false",
        formula,
        shown,
        f"True of one token alone; 64 read {read[64] / top_k:.0f} times as many, and 256 all of them.",
    )


def _against_dense(model: ModelConfig) -> Iterator[Claim]:
    device, formats = find_device("h100"), named("bf16")
    twins = dense_equals(model)
    found = {name: crossover(model, twin, formats, device, CONTEXT) for name, twin in twins.items()}
    times = {
        name: ", ".join(f"{batch}: {each.ratios[BATCHES.index(batch)]:.2f}" for batch in _SHOWN)
        for name, each in found.items()
    }
    formula = "time of a decode step of the MoE / of the dense model, by roofline"
    where = f"Qwen3-30B-A3B on H100, bf16, {CONTEXT:,} tokens of context; batch and ratio"
    sizes = {name: f"{twin.total / 1e9:.1f}B" for name, twin in twins.items()}
    yield Claim(
        "An MoE loses against a dense model at small batches.",
        "it depends",
        formula,
        f"{where}: of equal active size ({sizes['active']}) {times['active']}; of equal total size ({sizes['total']}) "
        f"{times['total']}",
        "Against the dense model of its total size it wins there, reading a tenth; against that of its active size it "
        f"is {found['active'].in_words}, and slowest in between, where all experts are read for few tokens each.",
    )
    yield Claim(
        "An MoE wins against a dense model at large batches.",
        "it depends",
        formula,
        f"{where}: of equal active size {times['active']}; of equal quality by the rule sqrt(total x active) "
        f"({sizes['quality']}) {times['quality']}; of equal total size {times['total']}",
        "At large batches time follows operations: it comes near the dense model of its active size and never beats "
        "it; "
        f"that of equal quality it beats {found['quality'].in_words.removeprefix('as fast or faster ')}; that of its "
        "total size always.",
    )


def _generations() -> Claim:
    names = ("a100", "h100", "b200")
    devices = [find_device(name) for name in names]
    flops = [device.rate("bf16") / 1e12 for device in devices]
    memory = [device.memory_bytes / 2**30 for device in devices]
    bandwidth = [device.bandwidth / 1e12 for device in devices]
    shown = (
        f"{what} {' -> '.join(f'{each:,.4g}' for each in values)} {unit} (x{values[-1] / values[0]:.1f})"
        for what, values, unit in (
            ("16-bit products", flops, "TFLOP/s"),
            ("memory", memory, "GiB"),
            ("bandwidth", bandwidth, "TB/s"),
        )
    )
    return Claim(
        "Over GPU generations memory grows faster than compute.",
        "false",
        "last / first, A100 -> H100 -> B200",
        "; ".join(shown),
        "The other way round: operations grew about three times as much as memory, counting no narrower formats; that "
        "is what makes few active parameters in much memory dear, not cheap.",
    )
