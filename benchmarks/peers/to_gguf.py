"""The models of make_models.py as GGUF files in bf16, Q8_0, Q4_0 and Q4_K_M, made by llama.cpp's own tools.

    python benchmarks/peers/to_gguf.py LLAMA_CPP MODELS GGUF_FOLDER [--only A,C]

LLAMA_CPP: its source tree with build/bin/llama-quantize (see README.md). Its converter knows a tokenizer by a hash of
what it makes of one text, and cannot know one that was trained here, so it is told: numbers are cut into digits, which
it calls "smollm". Runs in an environment with torch, transformers and sentencepiece.
"""

import argparse
import runpy
import subprocess
import sys
from importlib import import_module
from pathlib import Path

QUANTIZED = ("Q8_0", "Q4_0", "Q4_K_M")


def convert(tree: Path, model: Path, target: Path) -> None:
    """One folder to one file in bf16."""
    sys.path[:0] = [path for path in (str(tree), str(tree / "gguf-py")) if path not in sys.path]
    base = import_module("conversion.base")
    base.TextModel.get_vocab_base_pre = lambda _self, _tokenizer: "smollm"
    script = tree / "convert_hf_to_gguf.py"
    sys.argv = [str(script), str(model), "--outfile", str(target), "--outtype", "bf16"]
    runpy.run_path(str(script), run_name="__main__")


def quantize(tree: Path, source: Path, target: Path, kind: str) -> None:
    """One file in fewer bits, as llama-quantize chooses them."""
    subprocess.run([tree / "build/bin/llama-quantize", source, target, kind, "2"], check=True, capture_output=True)


def main() -> None:
    """Convert every model, and quantize it in every way."""
    parser = argparse.ArgumentParser(description="Models as GGUF files.")
    parser.add_argument("llama_cpp", type=Path)
    parser.add_argument("models", type=Path)
    parser.add_argument("gguf", type=Path)
    parser.add_argument("--only", help="names, comma-separated (all in MODELS)")
    options = parser.parse_args()
    names = (
        options.only.split(",")
        if options.only
        else sorted(path.parent.name for path in options.models.glob("*/config.json"))
    )
    options.gguf.mkdir(parents=True, exist_ok=True)
    for name in names:
        whole = options.gguf / f"{name}-bf16.gguf"
        convert(options.llama_cpp, options.models / name, whole)
        for kind in QUANTIZED:
            quantize(options.llama_cpp, whole, options.gguf / f"{name}-{kind}.gguf", kind)
            print(options.gguf / f"{name}-{kind}.gguf", flush=True)


if __name__ == "__main__":
    main()
