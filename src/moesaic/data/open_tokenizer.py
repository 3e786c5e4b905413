"""The tokenizer that a model brings along, wherever it lies."""

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # at run time the packages come in only once a tokenizer is opened
    from moesaic.data.tokenizer import Tokenizer


def open_tokenizer(path_or_preset: str | os.PathLike[str]) -> "Tokenizer":
    """The tokenizer that a checkpoint carries. Raises CheckpointError when there is none that can be read."""
    from moesaic.data.tokenizer import Tokenizer
    from moesaic.hub.resolve import weights_place

    place = weights_place(path_or_preset)
    if place.kind == "folder":
        return Tokenizer.load(place.path)
    from moesaic.hub.gguf import read_metadata

    return Tokenizer.from_gguf(read_metadata(place.path))
