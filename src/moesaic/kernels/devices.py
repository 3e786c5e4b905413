"""Where a model computes: the names of devices that users write, and the devices that they stand for."""

import os
import re
from typing import TYPE_CHECKING

from moesaic.errors import ConfigError, MissingDependencyError

if TYPE_CHECKING:  # names are checked without torch
    import torch

AUTO = "auto"
_NAME = re.compile(r"auto|cpu|cuda(:\d+)?")
_KNOWN = "auto, cpu, cuda or cuda:1"


def check_name(name: str, where: str) -> None:
    """Raise ConfigError for what names no device; `where` says who wrote it. Whether it is there is left open."""
    if not _NAME.fullmatch(name):
        raise ConfigError(f"{where}={name!r}; use {_KNOWN}")


def device_of(name: str, where: str) -> "torch.device":
    """The device that a name stands for. "auto": what MOESAIC_DEVICE names, else the first GPU, else the CPU.

    Raises ConfigError for a name that is none, MissingDependencyError for a GPU that torch does not find.
    """
    import torch

    check_name(name, where)
    if name == AUTO and (wanted := os.environ.get("MOESAIC_DEVICE", AUTO)) != AUTO:
        return device_of(wanted, "MOESAIC_DEVICE")
    if name == AUTO:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(name)
    if device.type == "cpu":
        return device
    if not torch.cuda.is_available():
        why = (
            f"no GPU that its driver shows (CUDA {torch.version.cuda})" if torch.version.cuda else "none, by its build"
        )
        raise MissingDependencyError(
            f"{where}={name!r} and torch {torch.__version__} finds {why}; use cpu, or install a torch with CUDA and "
            "NVIDIA's driver"
        )
    number, count = device.index or 0, torch.cuda.device_count()
    if number >= count:
        raise MissingDependencyError(
            f"{where}={name!r} and torch finds {count} of them; use cuda:0 to cuda:{count - 1}"
        )
    return torch.device("cuda", number)


def described(device: "torch.device") -> str:
    """The device for a message: "cpu", or "cuda:0 (NVIDIA H100 80GB HBM3)"."""
    import torch

    return f"{device} ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else str(device)
