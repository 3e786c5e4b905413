"""Models as vLLM's products of 8-bit integers want them: a scale for each output, inputs rounded token by token.

    python benchmarks/peers/to_int8.py MODEL TARGET

Its kernels of 8 bits for processors take these alone (W8A8 of compressed-tensors), and no groups of inputs as
`moesaic quantize --bits 8` writes them; for 4 bits they take that command's files with `--group 128`. Everything is
rounded but embeddings, norms, routers and the head.
"""

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

KEPT = ("embed_tokens.weight", "lm_head.weight", "mlp.gate.weight", "block_sparse_moe.gate.weight")
LEVELS = 127


def rounded(weight_FD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """To the nearest of 255 levels of each output's own largest weight: int8 [F, D] and scales [F, 1] in fp32."""
    scale_F1 = weight_FD.float().abs().amax(dim=1, keepdim=True).clamp(min=1e-12) / LEVELS
    return (weight_FD.float() / scale_F1).round().to(torch.int8), scale_F1


def described(kept: list[str]) -> dict[str, Any]:
    """What config.json says of it."""
    common = {"num_bits": 8, "type": "int", "symmetric": True}
    group = {
        "targets": ["Linear"],
        "weights": common | {"strategy": "channel", "dynamic": False},
        "input_activations": common | {"strategy": "token", "dynamic": True},
    }
    return {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": kept,
    }


def main() -> None:
    """Round one folder into another."""
    parser = argparse.ArgumentParser(description="A model in 8 bits as vLLM takes it on processors.")
    parser.add_argument("model", type=Path)
    parser.add_argument("target", type=Path)
    options = parser.parse_args()
    shutil.copytree(options.model, options.target, ignore=shutil.ignore_patterns("*.safetensors*"))
    written: dict[str, torch.Tensor] = {}
    kept: list[str] = []
    for file in sorted(options.model.glob("*.safetensors")):
        for name, tensor in load_file(file).items():
            if tensor.dim() != 2 or name.endswith(KEPT):
                written[name] = tensor
                kept += [name.removesuffix(".weight")] if tensor.dim() == 2 else []
            else:
                written[name], written[f"{name}_scale"] = rounded(tensor)
    save_file(written, options.target / "model.safetensors", {"format": "pt"})
    config = json.loads((options.model / "config.json").read_text(encoding="utf-8"))
    config["quantization_config"] = described(kept)
    (options.target / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
