"""Every instruction set that was compiled and that this processor has, one after the other."""

from collections.abc import Iterator

import pytest

try:
    from moesaic import _native
except ImportError:  # no C++ compiler: what asks for `isa` skips itself when it is collected
    _native = None


@pytest.fixture(params=_native.available_isas() if _native else [])
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """The kernels in use are those of the instruction set of this name."""
    assert _native is not None
    before = _native.isa()
    assert _native.use_isa(request.param)
    yield request.param
    _native.use_isa(before)
