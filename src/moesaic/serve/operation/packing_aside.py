"""A process that packs a model into a file while a server beside it goes on: one thread, at a low priority."""

import json
import os
import sys
from pathlib import Path

from moesaic.errors import MoesaicError

# Steps beside it take longer by what it gets of a processor: measured 4 to 8%, at 10 14 to 24%. At 19, the lowest,
# loading would take longer yet.
NICE = 15


def main(settings: str, file: str) -> int:
    """Pack the model of these settings (JSON). Returns the exit code; what is wrong is the last line on stderr."""
    os.nice(NICE)
    import torch

    from moesaic.serve.operation.opening import open_model
    from moesaic.serve.operation.settings import ModelSettings

    torch.set_num_threads(1)
    try:
        open_model(ModelSettings(**json.loads(settings)), Path(file), threads=1)
    except MoesaicError as error:
        sys.stderr.write(f"{' '.join(str(error).split())}\n")
        return 2
    return 0
