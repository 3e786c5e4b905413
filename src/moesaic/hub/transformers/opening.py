"""A folder that transformers reads, whether or not moesaic does."""

from pathlib import Path
from typing import Any

from torch import nn
from transformers import AutoModelForCausalLM

from moesaic.errors import CheckpointError


def open_model(folder: str | Path) -> nn.Module:
    """The language model in a folder, in the number format of its files, ready for evaluation.

    Nothing is downloaded, and no code that the folder may bring is run. Raises CheckpointError for what transformers
    does not read either.
    """
    opening: Any = AutoModelForCausalLM
    try:
        return opening.from_pretrained(folder, local_files_only=True, dtype="auto").eval()
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(f"transformers cannot read {folder} either: {reason}; check its config.json") from error
