"""Routers: logits in fp32, and the choice of experts (see layers/router.py)."""

from moesaic.config import RouterConfig
from moesaic.engine.builder import Builder, Label, native_packed
from moesaic.kernels.native_routing import NativeRouter, RouterTensors


def lower_router(build: Builder, config: RouterConfig, name: str, layer: int) -> None:
    """Choices of experts for what is normed, sorted by expert, for the step that computes them."""
    label = Label("router", layer)
    there = {spec.name.removeprefix(f"{name}.") for spec in config.tensors(name, build.config.hidden_size)}
    own = [field for field in RouterTensors._fields if field in there]
    read = {field: build.packer.weights.read(f"{name}.{field}") for field in own}
    tensors = {field: value.int() if field == "table" else value.float() for field, value in read.items()}
    router = NativeRouter(config, RouterTensors(**tensors))
    matrix = native_packed(build.packer.exact(f"{name}.weight", label.part)) if config.has_weight else None
    build.native.router(label, build.normed, matrix, router.native)
