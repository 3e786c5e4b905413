"""The routing trace as a file (numpy only): which expert served which token, with what weight.

layout: what stands where in the file | rows: rows in token order, and one forward pass of them
fingerprint: whose rows they are | spool, writer: streaming them to the disk | reader: verifying and reading them
"""

from moesaic.trace.fingerprint import Fingerprint, LayerFingerprint
from moesaic.trace.reader import Trace
from moesaic.trace.rows import TokenRows, TracedForward
from moesaic.trace.writer import TraceWriter

__all__ = ["Fingerprint", "LayerFingerprint", "TokenRows", "Trace", "TraceWriter", "TracedForward"]
