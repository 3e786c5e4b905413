"""Training on a GPU: tokens/s of an MoE (271M parameters, 60M active) beside its dense twin of equal active parameters.

Whole steps as the trainer takes them, in bf16 with fp32 masters: forward and backward passes, balance loss, telemetry,
clipping, AdamW. "Of peak" is the FLOPs of the model's matrix products (three times those of a forward pass; a token
attends to half a sequence) over what the GPU's datasheet says for dense bf16 (NVIDIA H100 SXM: 989 TFLOP/s).

    python benchmarks/gpu_training.py [--device cuda] [--sequences 64] [--micro-batches 4] [--plain] [--json]
"""

import argparse
import json
import time
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from moesaic.config import MlpConfig, ModelConfig
from moesaic.data.loader import Batch
from moesaic.families import from_hf
from moesaic.kernels import cuda
from moesaic.kernels.devices import described, device_of
from moesaic.models.decoder import Decoder
from moesaic.telemetry.recorder import LoadRecorder
from moesaic.train.memory import peak_memory_bytes, reset_peak_memory
from moesaic.train.recipe import TrainSettings
from moesaic.train.step import Stepper
from moesaic.train.twins import dense_twin

SEQUENCE = 1024
CONFIG = {
    "model_type": "qwen3_moe",
    "vocab_size": 16384,
    "hidden_size": 768,
    "num_hidden_layers": 8,
    "num_attention_heads": 12,
    "num_key_value_heads": 12,
    "head_dim": 64,
    "max_position_embeddings": SEQUENCE,
    "num_experts": 32,
    "num_experts_per_tok": 4,
    "moe_intermediate_size": 384,
    "norm_topk_prob": True,
}
H100_FLOPS = 989e12
WARM_UP, STEPS = 3, 8


def aligned_twin(moe: ModelConfig) -> ModelConfig:
    """The dense twin of equal active parameters, to 64 channels: products of other widths are far slower on a GPU."""
    twin = dense_twin(moe, "active")
    blocks = [layer.feed_forward for layer in twin.layers]
    sizes = [64 * round(block.intermediate_size / 64) for block in blocks if isinstance(block, MlpConfig)]
    layers = tuple(
        replace(layer, feed_forward=replace(layer.feed_forward, intermediate_size=size))
        for layer, size in zip(twin.layers, sizes, strict=True)
    )
    return replace(twin, decoder=replace(twin.decoder, layers=layers))


def batch(number: int, sequences: int) -> Batch:
    ids = np.random.default_rng(number).integers(0, CONFIG["vocab_size"], (sequences, SEQUENCE + 1))
    return Batch(
        inputs_BS=ids[:, :-1].copy(),
        targets_BS=ids[:, 1:].copy(),
        domain_ids_B=np.zeros(sequences, dtype=np.int64),
        document_ids_BS=np.zeros((sequences, SEQUENCE), dtype=np.int64),
    )


def measure(config: ModelConfig, sequences: int, micro_batches: int, device: torch.device, peak: float) -> Any:
    """A model's tokens/s, its share of the GPU's peak, and the memory of its tensors."""
    balance: tuple[tuple[str, float], ...] = (("switch", 0.01),) if config.moe_layers else ()
    settings = TrainSettings(
        steps=100,
        batch_size=sequences,
        micro_batches=micro_batches,
        sequence_length=SEQUENCE,
        precision="bf16",
        learning_rate=1e-3,
        balance_losses=balance,
    )
    stepper = Stepper(Decoder(config).initialize(0).to(device), settings)
    recorder = LoadRecorder.for_model(config, num_domains=1)
    batches = [batch(number, sequences) for number in range(micro_batches)]
    reset_peak_memory(device)
    started = 0.0
    for step in range(WARM_UP + STEPS):
        if step == WARM_UP:
            torch.cuda.synchronize(device)
            started = time.perf_counter()
        stepper.run(step, batches, recorder)
    torch.cuda.synchronize(device)
    tokens_per_s = STEPS * settings.tokens_per_step / (time.perf_counter() - started)
    return {
        "total_parameters": config.total,
        "active_parameters": config.active_gemm,
        "tokens_per_step": settings.tokens_per_step,
        "tokens_per_s": tokens_per_s,
        "of_peak": 3 * config.flops_per_token(SEQUENCE // 2) * tokens_per_s / peak,
        "peak_memory_bytes": peak_memory_bytes(device),
    }


def main() -> None:
    """Train each kind, print its speed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--sequences", type=int, default=64, help="of a micro-batch")
    parser.add_argument("--micro-batches", type=int, default=4)
    parser.add_argument("--peak-tflops", type=float, default=H100_FLOPS / 1e12)
    parser.add_argument("--plain", action="store_true", help="without the kernels that Triton builds")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    device, moe = device_of(args.device, "--device"), from_hf(CONFIG)
    if args.plain:
        cuda._built = lambda device: None  # pyright: ignore[reportPrivateUsage]
    sizes = (args.sequences, args.micro_batches, device, 1e12 * args.peak_tflops)
    results = {"MoE": measure(moe, *sizes), "dense, equal active": measure(aligned_twin(moe), *sizes)}
    if args.json:
        print(json.dumps({"device": described(device), "torch": torch.__version__, **results}))
        return
    print(f"{described(device)}, torch {torch.__version__}, {moe.family} and its dense twin")
    for name, found in results.items():
        print(
            f"{name:20s} {found['total_parameters'] / 1e6:4.0f}M parameters, {found['active_parameters'] / 1e6:3.0f}M "
            f"active: {found['tokens_per_s'] / 1e3:6.0f}k tokens/s, {found['of_peak']:.1%} of peak, "
            f"{found['peak_memory_bytes'] / 2**30:.1f} GiB"
        )


if __name__ == "__main__":
    main()
