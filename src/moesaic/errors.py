"""Everything a user of moesaic can do wrong, as exceptions.

MoesaicError
├── ConfigError        a model or run description that contradicts itself or names something unknown
├── CheckpointError    files that are missing, cut short, of the wrong shape, or not what their index says
├── DataError          text that cannot be read, or too little of it
├── GenerationError    a prompt or a request that the model cannot continue
├── RunFolderError     an output folder that another run is using, or that cannot be written
└── MissingDependencyError   an optional package or file that this action needs

Each message is one line: what was seen, what is allowed, what to do next. The command line prints it and exits with 2.
"""


class MoesaicError(Exception):
    """The base of every error that moesaic raises for a user's mistake."""


class ConfigError(MoesaicError):
    """A description of a model or a run that cannot be built."""


class CheckpointError(MoesaicError):
    """A checkpoint that cannot be read or written as it stands."""


class DataError(MoesaicError):
    """Text that cannot be used."""


class GenerationError(MoesaicError):
    """A prompt or a request that the model cannot continue."""


class RunFolderError(MoesaicError):
    """An output folder that is in use or cannot be written."""


class MissingDependencyError(MoesaicError):
    """An optional package or file that this action needs."""
