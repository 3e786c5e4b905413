"""Several processes training one model."""

from moesaic.parallel.ranks import ALONE, Alone, ProcessGroup, Ranks

__all__ = ["ALONE", "Alone", "ProcessGroup", "Ranks"]
