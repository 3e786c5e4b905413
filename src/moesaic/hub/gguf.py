"""GGUF files (llama.cpp) in: the only place that imports the `gguf` package. No torch here.

Tensors are dequantized to fp32, and what llama.cpp's converter rearranged is put back.
"""

from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from moesaic import families
from moesaic.config import AttentionConfig, ModelConfig
from moesaic.errors import CheckpointError, ConfigError, MissingDependencyError
from moesaic.hub.gguf_header import GgufHeader
from moesaic.hub.safetensors_header import TensorHeader
from moesaic.models.weight_map import Piece, WeightMap
from moesaic.tensor_spec import TensorSpec

_OUTER = {"embedding": "token_embd", "final_norm": "output_norm", "head": "output"}
_LAYER = {
    "attention_norm": "attn_norm",
    "feed_forward_norm": "ffn_norm",
    "attention.o_proj": "attn_output",
    **{f"attention.{part}_proj": f"attn_{part}" for part in "qkv"},
    **{f"attention.{part}_norm": f"attn_{part}_norm" for part in "qk"},
    **{f"feed_forward.{part}_proj": f"ffn_{part}" for part in ("gate", "up", "down")},
    "feed_forward.router": "ffn_gate_inp",
    **{f"feed_forward.shared_experts.{part}_proj": f"ffn_{part}_shexp" for part in ("gate", "up", "down")},
    "feed_forward.shared_gate": "ffn_gate_inp_shexp",
}


class Architecture(NamedTuple):
    """What a `general.architecture` means to us.

    permutes_heads: its converter turned q and k from the half-split rotary layout to interleaved pairs.
    renormalizes: llama.cpp divides the chosen experts' weights by their sum; the files do not say.
    """

    dense: str | None
    moe: str | None
    permutes_heads: bool = False
    renormalizes: bool = True


ARCHITECTURES = {
    "llama": Architecture(dense="llama", moe="mixtral", permutes_heads=True),
    "qwen2": Architecture(dense="qwen2", moe=None),
    "qwen2moe": Architecture(dense=None, moe="qwen2_moe", renormalizes=False),
    "qwen3": Architecture(dense="qwen3", moe=None),
    "qwen3moe": Architecture(dense=None, moe="qwen3_moe"),
}


def read_metadata(path: Path) -> dict[str, Any]:
    """Every key of the file's header as plain Python values. Raises CheckpointError for a damaged file."""
    return GgufFile(path).metadata


def _reader(path: Path) -> Any:
    try:
        from gguf import GGUFReader
    except ImportError as error:
        raise MissingDependencyError("reading .gguf files needs the package gguf; run: pip install gguf") from error

    class PlainReader(GGUFReader):
        """The same over a plain view of the mapped file: slicing an np.memmap made opening a file take 6 s, not 2."""

        @property
        def data(self) -> np.ndarray:  # pyright: ignore[reportIncompatibleVariableOverride]
            return self._plain

        @data.setter
        def data(self, mapped: np.ndarray) -> None:
            self._plain = np.asarray(mapped)

    try:
        with path.open("rb") as file:
            magic = file.read(4)
        if magic != b"GGUF":
            raise CheckpointError(f"{path} does not start like a GGUF file; copy or download it again")
        return PlainReader(path)
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}; check the path") from error
    except (ValueError, IndexError, KeyError, OverflowError) as error:
        raise CheckpointError(f"{path} is cut short or damaged ({error}); copy or download it again") from error


class GgufFile:
    """A GGUF file as a configuration and a source of fp32 arrays.

    Raises CheckpointError for a damaged file, ConfigError for a model that we cannot express.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._reader = _reader(path)
        self._tensors = {tensor.name: tensor for tensor in self._reader.tensors}

    @cached_property
    def metadata(self) -> dict[str, Any]:
        """Every key of the file's header as plain Python values: figures, vocabulary, chat template."""
        fields = self._reader.fields.items()
        return {name: field.contents() for name, field in fields if not name.startswith("GGUF.")}

    @cached_property
    def tensors(self) -> dict[str, TensorHeader]:
        """Shapes as torch counts them: outermost first, the other way round than GGUF. All read as fp32."""
        shapes = {name: tuple(int(size) for size in reversed(each.shape)) for name, each in self._tensors.items()}
        return {name: TensorHeader("F32", _as_matrix(name, shape), self.path) for name, shape in shapes.items()}

    @property
    def stored_bytes(self) -> dict[str, int]:
        """What each tensor takes in the file, as it is packed there."""
        return {name: int(tensor.n_bytes) for name, tensor in self._tensors.items()}

    @cached_property
    def config(self) -> ModelConfig:
        return config_from_gguf(self.metadata, self.tensors, self.path)

    def weight_map(self) -> WeightMap:
        """Our tensors and their names in the file, where experts are stacked already."""
        return names_in_gguf(self.config)

    def read(self, name: str) -> np.ndarray:
        """One tensor, fp32, freshly allocated."""
        from gguf.quants import dequantize

        tensor = self._tensors[name]
        try:
            values = dequantize(tensor.data, tensor.tensor_type)
        except NotImplementedError as error:
            raise CheckpointError(
                f"{name} in {self.path} is of type {tensor.tensor_type.name}, which the gguf package cannot unpack"
            ) from error
        values = np.array(values, dtype=np.float32).reshape(self.tensors[name].shape)
        if ARCHITECTURES[self.metadata["general.architecture"]].permutes_heads:
            attention = self.config.layers[0].attention
            assert isinstance(attention, AttentionConfig), "no architecture listed here has another"
            if ".attn_q." in name:
                return _half_split(values, attention.num_heads)
            if ".attn_k." in name:
                return _half_split(values, attention.num_key_value_heads)
        return values


def _as_matrix(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The gate of a shared expert is a matrix of one row, which converters squeeze to a vector."""
    return (1, *shape) if name.endswith("ffn_gate_inp_shexp.weight") and len(shape) == 1 else shape


def names_in_gguf(config: ModelConfig) -> WeightMap:
    """Our tensors and their names in a file of such a model."""
    return {spec.name: _pieces(spec) for spec in config.tensors()}


def config_of_header(header: GgufHeader, path: Path) -> ModelConfig:
    """The description of a file's model from its header alone. Raises ConfigError for one that we cannot express."""
    tensors = {
        name: TensorHeader("F32", _as_matrix(name, tensor.shape), path) for name, tensor in header.tensors.items()
    }
    return config_from_gguf(header.metadata, tensors, path)


def _half_split(values: np.ndarray, num_heads: int) -> np.ndarray:
    """Rows of each head from interleaved pairs back to halves (undoes `permute` of llama.cpp's converter)."""
    pairs = values.reshape(num_heads, -1, 2, *values.shape[1:])
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(values.shape)


def _pieces(spec: TensorSpec) -> tuple[Piece, ...]:
    if not spec.name.startswith("layers."):
        module, kind = spec.name.rsplit(".", 1)
        return (Piece(f"{_OUTER[module]}.{kind}"),)
    _, layer, inner = spec.name.split(".", 2)
    if inner == "feed_forward.experts.down":
        return (Piece(f"blk.{layer}.ffn_down_exps.weight"),)
    if inner == "feed_forward.experts.gate_up":
        half = spec.shape[1] // 2
        gate, up = (slice(None), slice(0, half)), (slice(None), slice(half, 2 * half))
        return Piece(f"blk.{layer}.ffn_gate_exps.weight", gate), Piece(f"blk.{layer}.ffn_up_exps.weight", up)
    module, kind = inner.rsplit(".", 1)
    return (Piece(f"blk.{layer}.{_LAYER[module]}.{kind}"),)


def config_from_gguf(metadata: dict[str, Any], tensors: dict[str, TensorHeader], path: Path) -> ModelConfig:
    """The description of the model, through the family's own reading of the same figures as a config.json."""
    name = metadata.get("general.architecture")
    if name not in ARCHITECTURES:
        raise ConfigError(f"{path}: architecture {name!r} is not supported; known: {', '.join(ARCHITECTURES)}")
    prefix = f"{name}."
    fields = {key.removeprefix(prefix): value for key, value in metadata.items() if key.startswith(prefix)}
    if not 0 < (layers := fields.get("block_count", 0)) <= len(tensors):
        raise CheckpointError(f"{path} states {layers} layers and holds {len(tensors)} tensors; download it again")
    num_experts = fields.get("expert_count", 0)
    family = ARCHITECTURES[name].moe if num_experts else ARCHITECTURES[name].dense
    if family is None:
        raise ConfigError(f"{path}: architecture {name!r} with {num_experts} experts is not supported")
    if "rope_freqs.weight" in tensors or fields.get("rope.scaling.type", "none") != "none":
        raise ConfigError(f"{path}: scaled rotary positions are not supported; known: plain ones")
    try:
        return families.from_hf(_hf_fields(family, fields, metadata, tensors))
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


def _hf_fields(
    family: str, fields: dict[str, Any], metadata: dict[str, Any], tensors: dict[str, TensorHeader]
) -> dict[str, Any]:
    embedding, shared = tensors.get("token_embd.weight"), tensors.get("blk.0.ffn_up_shexp.weight")
    head_dim = fields.get("attention.key_length")
    rotated = fields.get("rope.dimension_count")
    num_heads, hidden_size = fields.get("attention.head_count"), fields.get("embedding_length")
    if head_dim is None and rotated and num_heads and hidden_size:
        head_dim = hidden_size // num_heads
    partial = rotated / head_dim if rotated and head_dim else 1.0
    return {
        "model_type": family,
        "vocab_size": embedding.shape[0] if embedding else None,
        "hidden_size": hidden_size,
        "num_hidden_layers": fields.get("block_count"),
        "num_attention_heads": num_heads,
        "num_key_value_heads": fields.get("attention.head_count_kv", num_heads),
        "head_dim": head_dim,
        "intermediate_size": fields.get("feed_forward_length"),
        "moe_intermediate_size": fields.get("expert_feed_forward_length", fields.get("feed_forward_length")),
        "num_experts": fields.get("expert_count") or None,
        "num_experts_per_tok": fields.get("expert_used_count") or None,
        "norm_topk_prob": ARCHITECTURES[metadata["general.architecture"]].renormalizes,
        "shared_expert_intermediate_size": shared.shape[0] if shared else None,
        "mlp_only_layers": [
            layer for layer in range(fields.get("block_count", 0)) if f"blk.{layer}.ffn_gate.weight" in tensors
        ],
        "max_position_embeddings": fields.get("context_length"),
        "rms_norm_eps": _shortest(fields.get("attention.layer_norm_rms_epsilon")),
        "rope_theta": _shortest(fields.get("rope.freq_base")),
        "partial_rotary_factor": partial,
        "sliding_window": fields.get("attention.sliding_window") or None,
        "attention_bias": "blk.0.attn_q.bias" in tensors,
        "mlp_bias": "blk.0.ffn_up.bias" in tensors,
        "tie_word_embeddings": "output.weight" not in tensors,
        "bos_token_id": metadata.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": metadata.get("tokenizer.ggml.eos_token_id"),
        "pad_token_id": metadata.get("tokenizer.ggml.padding_token_id"),
    }


def _shortest(value: float | None) -> float | None:
    """GGUF stores fp32: 9.999999747378752e-06 was written as 1e-05."""
    return None if value is None else float(str(np.float32(value)))
