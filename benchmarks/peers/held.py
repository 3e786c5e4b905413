"""Bytes of a model's matrices in files, by part: what an engine that reads them as they are must read."""

from pathlib import Path

from moesaic.hub.safetensors_header import read_header

EXPERTS, HEAD, OTHERS = "experts", "head", "others"


def of_gguf(path: Path) -> dict[str, int]:
    """Of a GGUF file, without the table of embeddings, of which a token reads one row."""
    from gguf import GGUFReader

    sizes: dict[str, int] = dict.fromkeys((EXPERTS, HEAD, OTHERS), 0)
    for tensor in GGUFReader(path).tensors:
        if tensor.name != "token_embd.weight":
            part = EXPERTS if "_exps" in tensor.name else HEAD if tensor.name == "output.weight" else OTHERS
            sizes[part] += int(tensor.n_bytes)
    return sizes


def of_folder(path: Path) -> dict[str, int]:
    """Of a folder of safetensors files, likewise."""
    sizes: dict[str, int] = dict.fromkeys((EXPERTS, HEAD, OTHERS), 0)
    for file in sorted(path.glob("*.safetensors")):
        for name, tensor in read_header(file).items():
            if "embed_tokens" not in name:
                part = EXPERTS if ".experts." in name else HEAD if "lm_head" in name else OTHERS
                sizes[part] += tensor.num_bytes
    return sizes
