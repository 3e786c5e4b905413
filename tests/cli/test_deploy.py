"""The unit for systemd and the Dockerfile say what `moesaic serve` understands."""

import argparse
import json
import re
import shlex
from pathlib import Path

import pytest

from moesaic.cli import serve

ROOT = Path(__file__).parents[2]
UNIT, DOCKERFILE = ROOT / "deploy" / "moesaic.service", ROOT / "deploy" / "Dockerfile"


def parsed(words: list[str]) -> argparse.Namespace:
    """The options of a command line; fails where there is one that `moesaic serve` has not."""
    assert words[:2] == ["/opt/moesaic/bin/moesaic", "serve"]
    parser = argparse.ArgumentParser(exit_on_error=False, allow_abbrev=False)
    serve.add_arguments(parser)
    return parser.parse_args(words[2:])


def line_of(file: Path, begin: str) -> str:
    """What follows the only line that begins so."""
    [line] = re.findall(rf"^{begin}(.*)$", file.read_text(), re.MULTILINE)
    return line


def test_the_unit_starts_a_server() -> None:
    args = parsed(shlex.split(line_of(UNIT, "ExecStart=")))
    assert args.config == Path("/etc/moesaic/serve.toml")
    assert args.api_key_file == "${CREDENTIALS_DIRECTORY}/" + line_of(UNIT, "LoadCredential=").split(":")[0]


def test_the_unit_waits_for_draining() -> None:
    from moesaic.serve.operation.settings import ServeSettings

    assert int(line_of(UNIT, "TimeoutStopSec=")) > ServeSettings(models={}).drain_seconds + 10


def test_the_container_starts_a_server() -> None:
    args = parsed([*json.loads(line_of(DOCKERFILE, "ENTRYPOINT ")), "/model", "--bits", "4"])
    assert (args.host, args.models, args.bits) == ("0.0.0.0", ["/model"], 4)
    assert line_of(DOCKERFILE, "USER ") != "root"


@pytest.mark.parametrize("name", ["pyproject.toml", "CMakeLists.txt", "README.md", "LICENSE", "csrc", "src"])
def test_what_the_image_is_made_of_is_sent_to_the_builder(name: str) -> None:
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    assert "*" in ignored and f"!{name}" in ignored
    copied = [
        word
        for line in re.findall(r"^COPY (?!--from)(.*)$", DOCKERFILE.read_text(), re.MULTILINE)
        for word in line.split()
    ]
    assert name in copied and (ROOT / name).exists()
