import pytest

from moesaic.errors import ConfigError
from moesaic.serve.operation.keys import Keys, presented, read_keys


@pytest.fixture
def key_file(tmp_path):
    path = tmp_path / "keys"
    path.touch(mode=0o600)

    def write(text: str) -> str:
        path.write_text(text)
        return str(path)

    return write


def test_keys_come_from_file_and_environment(key_file) -> None:
    keys = read_keys(key_file("# people\nalice:sk-a\n\n sk-b \n"), {"MOESAIC_API_KEYS": "bob:sk-c,sk-d"})
    assert [keys.name_of(key) for key in ("sk-a", "sk-b", "sk-c", "sk-d")] == ["alice", "key-2", "bob", "key-4"]
    assert [keys.name_of(key) for key in ("", "sk", "alice", "alice:sk-a", "sk-a ", "ß")] == [None] * 6


def test_without_keys_there_are_none() -> None:
    keys = read_keys(None, {})
    assert not keys and keys.name_of("x") is None


def test_nothing_of_keys_shows_them() -> None:
    keys = Keys([("alice", "sk-secret")])
    assert "secret" not in repr(keys) + str(vars(keys))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "has no keys"),
        ("# none\n", "has no keys"),
        ("a:x\na:y", "is there before"),
        ("a:x\nb:x", "is there before"),
        ("a b c", "line 1 of"),
        ("name:", "is no key"),
        ("schlüssel", "is no key"),
    ],
    ids=["empty", "comment", "name twice", "key twice", "spaces", "no key", "not ASCII"],
)
def test_bad_files(key_file, text: str, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read_keys(key_file(text), {})
    assert words in str(caught.value)
    assert ":x" not in str(caught.value)


def test_a_file_that_everybody_reads(key_file, tmp_path) -> None:
    path = key_file("a:x")
    (tmp_path / "keys").chmod(0o644)
    with pytest.raises(ConfigError, match="chmod 600"):
        read_keys(path, {})


def test_a_file_that_is_not_there(tmp_path) -> None:
    with pytest.raises(ConfigError, match="No such file"):
        read_keys(str(tmp_path / "none"), {})


def test_how_a_request_brings_its_key() -> None:
    assert presented([(b"authorization", b"Bearer sk-a")]) == "sk-a"
    assert presented([(b"authorization", b"bearer  sk-a ")]) == "sk-a"
    assert presented([(b"x-api-key", b"sk-b")]) == "sk-b"
    assert presented([(b"authorization", b"Basic sk-a"), (b"cookie", b"x")]) is None
