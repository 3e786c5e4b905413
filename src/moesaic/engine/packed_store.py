"""Packed weights kept in a file between one start and the next."""

from collections.abc import Mapping
from pathlib import Path

from moesaic.engine.packing import Packer, Precision
from moesaic.engine.weights import FileWeights, Weights
from moesaic.errors import ConfigError
from moesaic.hub.packed_files import read_packed, source_of, write_packed
from moesaic.kernels.blocks import PackedMatrices


class PackedStore:
    """A file of packed matrices, of one source and one precision.

    Raises ConfigError for a model that came from no files, CheckpointError for a file that is damaged, of another
    version, or of other weights.
    """

    def __init__(self, path: Path, weights: Weights, precision: Precision) -> None:
        if not isinstance(weights, FileWeights):
            raise ConfigError("packed_file with a model in memory; only what came from files can be told apart again")
        self._path = path
        bits = f"{precision.bits or 'own'} bits, experts {precision.of_experts or 'own'}"
        bits += ", uneven" if precision.values == "uneven" else ""
        dtype = precision.dtype or "own dtype"
        self._source = source_of(f"{weights.where} ({bits}, {dtype})", weights.files)

    def read(self) -> Mapping[str, PackedMatrices]:
        """What the file holds, mapped into memory; nothing where there is none yet."""
        if not self._path.exists():
            return {}
        return read_packed(self._path, self._source, f"delete {self._path}, and it is written anew")

    def write(self, packer: Packer) -> None:
        """Keep what was packed beside what is held, unless that has all of it."""
        if not packer.packed.keys() <= packer.held.keys():
            write_packed(self._path, {**packer.held, **packer.packed}, self._source)
