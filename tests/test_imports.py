"""The direction of the rooms: a room imports only rooms above it, and what should start quickly loads no torch."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import moesaic.errors

SOURCE = Path(moesaic.errors.__file__).parent

# fmt: off
ROOMS = [
    "errors", "registry", "checks", "fields", "tensor_spec", "config",
    "trace", "placement", "kernels", "routing", "experts", "layers", "models",
    "families", "hub", "engine", "parallel", "plan", "data", "telemetry", "evaluate", "train", "tune", "quantize",
    "bench", "serve", "cli",
]

# And within the largest of them; its page is no Python.
SERVE_ROOMS = [
    "request", "seen", "tools", "text", "choice", "schedule", "speculation", "loop", "live_routing", "served",
    "loadtest", "http", "replicas", "operation",
]
# fmt: on

# Below everything and above nothing: the public names, and what `python -m moesaic` runs.
OUTSIDE = {"__init__", "__main__"}

# The compiled extension belongs to the room of kernels.
ALIASES = {"_native": "kernels"}

# Free of torch, whatever room they are in, so that rooms without torch may import them.
TORCH_FREE = [
    "errors.py",
    "registry.py",
    "checks.py",
    "fields.py",
    "tensor_spec.py",
    "config",
    "trace",
    "placement",
    "plan",
    "models/weight_map.py",
    "families",
]


def modules() -> list[Path]:
    return sorted(SOURCE.rglob("*.py"))


def name_of(path: Path) -> str:
    parts = path.relative_to(SOURCE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def room_of(module: str) -> str | None:
    """The room of "moesaic.<room>…"; None for the package itself."""
    parts = module.split(".")
    return ALIASES.get(parts[1], parts[1]) if len(parts) > 1 else None


def imports(path: Path) -> Iterator[str]:
    """Full names of everything that a file imports, also inside functions and under TYPE_CHECKING."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative imports hide which room they reach"
            assert node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("path", modules(), ids=name_of)
def test_a_room_imports_only_rooms_above_it(path: Path) -> None:
    name = path.relative_to(SOURCE).with_suffix("").parts[0]
    if name in OUTSIDE:
        return
    assert name in ROOMS, f"{name} is no room; give it a place in house order, here and in the docs"
    for imported in imports(path):
        if not imported.startswith("moesaic.") or imported == "moesaic.__version__":
            continue
        room = room_of(imported)
        assert room in ROOMS, f"{name_of(path)} imports {imported}, which is no room"
        assert ROOMS.index(room) <= ROOMS.index(name), f"{name_of(path)} imports {imported} from a room below"


@pytest.mark.parametrize("path", sorted((SOURCE / "serve").rglob("*.py")), ids=name_of)
def test_a_room_of_the_server_imports_only_rooms_above_it(path: Path) -> None:
    name = path.relative_to(SOURCE / "serve").with_suffix("").parts[0]
    if name in OUTSIDE:
        return
    assert name in SERVE_ROOMS, f"serve/{name} is no room; give it a place in house order, here and in the docs"
    for imported in imports(path):
        if imported.startswith("moesaic.serve."):
            room = imported.split(".")[2]
            assert room in SERVE_ROOMS, f"{name_of(path)} imports {imported}, which is no room"
            assert SERVE_ROOMS.index(room) <= SERVE_ROOMS.index(name), f"{name_of(path)} imports {imported} from below"


@pytest.mark.parametrize("start", TORCH_FREE)
def test_data_has_no_torch(start: str) -> None:
    place = SOURCE / start
    for path in [place] if place.suffix else sorted(place.rglob("*.py")):
        roots = {name.split(".")[0] for name in imports(path)}
        assert not roots & {"torch", "transformers"}, f"{name_of(path)} imports {roots}"


def test_only_the_bridge_needs_transformers() -> None:
    users = [name_of(path) for path in modules() if any(name.split(".")[0] == "transformers" for name in imports(path))]
    assert users and all(name.startswith("moesaic.hub.transformers.") for name in users)


HEAVY = ["torch", "transformers", "gguf", "tokenizers"]

RUN = """
import runpy, sys
sys.argv = ["moesaic", *{arguments!r}]
try:
    runpy.run_module({module!r}, run_name="__main__")
except SystemExit as end:
    assert end.code in (0, None), end.code
print("loaded:", *[name for name in {heavy!r} if name in sys.modules], file=sys.stderr)
"""


def loaded_by(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stderr.strip().splitlines()[-1]


def test_the_package_starts_without_torch() -> None:
    code = f"import sys, moesaic\nprint('loaded:', *[n for n in {HEAVY!r} if n in sys.modules], file=sys.stderr)"
    assert loaded_by(code) == "loaded:"


QUICK = [
    ["--help"],
    ["count", "qwen3-30b-a3b"],
    ["plan", "qwen3-30b-a3b", "--machine", "h100"],
    ["plan", "compare", "mixtral-8x7b", "llama-2-70b", "--machine", "2xh100", "--context", "4k"],
    ["plan", "claims"],
]


@pytest.mark.parametrize("arguments", QUICK, ids=" ".join)
def test_quick_verbs_start_without_torch(arguments: list[str]) -> None:
    assert loaded_by(RUN.format(arguments=arguments, module="moesaic.cli.main", heavy=HEAVY)) == "loaded:"


def test_a_server_starts_without_the_compiler() -> None:
    code = "import sys, moesaic.engine.engine\nprint('loaded:', 'torch._dynamo' in sys.modules, file=sys.stderr)"
    assert loaded_by(code) == "loaded: False"
