"""Everything a user of moesaic can do wrong, as exceptions.

MoesaicError
├── ConfigError        a model or run description that contradicts itself or names something unknown
├── CheckpointError    files that are missing, cut short, of the wrong shape, or not what their index says
├── DataError          text that cannot be read, or too little of it
├── TraceError         a routing trace that is damaged, of another version, or not of this model or batch
├── GenerationError    a prompt or a request that the model cannot continue
│   ├── QueueFullError      a request to a server where as many wait as may
│   └── ServerClosingError  a request to a server that takes none any more
├── NonFiniteError     training whose loss or gradient is infinite or not a number
├── RunFolderError     an output folder that another run is using, or that cannot be written
└── MissingDependencyError   an optional package or file that this action needs

Each message is one line: what was seen, what is allowed, what to do next. The command line prints it and exits with 2.
"""

import errno

OUT_OF_MEMORY = (
    "out of memory; use a smaller model, a smaller train.batch_size with more train.micro_batches, or "
    'train.recompute="layers" (generate and chat take --dtype bf16)'
)
_TORCH_SAYS = ("can't allocate memory", "not enough memory", "out of memory")


def ran_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, as Python, the system or torch (a plain RuntimeError) says it."""
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    if isinstance(error, RuntimeError):
        return any(words in str(error) for words in _TORCH_SAYS)
    return isinstance(error, MemoryError)


class MoesaicError(Exception):
    """The base of every error that moesaic raises for a user's mistake."""


class ConfigError(MoesaicError):
    """A description of a model or a run that cannot be built."""


class CheckpointError(MoesaicError):
    """A checkpoint that cannot be read or written as it stands."""


class DataError(MoesaicError):
    """Text that cannot be used."""


class TraceError(MoesaicError):
    """A routing trace that cannot be written, read or replayed as it stands."""


class GenerationError(MoesaicError):
    """A prompt or a request that the model cannot continue."""


class QueueFullError(GenerationError):
    """A request that may be made again in a while."""


class ServerClosingError(GenerationError):
    """A request that came too late: the server ends, or has ended."""


class NonFiniteError(MoesaicError):
    """A loss or gradient that is infinite or not a number. Nothing of the step has been applied.

    step counts from 0 (the message from 1, as metrics do). micro_batch is the index of the one whose `what` it was,
    None for the whole step's.
    """

    def __init__(self, *, step: int, what: str, value: float, micro_batch: int | None = None) -> None:
        super().__init__(
            f"the {what} is {value} at step {step + 1}; lower train.learning_rate and start again in another folder"
        )
        self.step, self.what, self.value, self.micro_batch = step, what, value, micro_batch


class RunFolderError(MoesaicError):
    """An output folder that is in use or cannot be written."""


class MissingDependencyError(MoesaicError):
    """An optional package or file that this action needs."""
