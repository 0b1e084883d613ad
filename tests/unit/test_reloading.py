"""Files that change while the server runs."""

from pathlib import Path

import pytest

from service.auth.reloading import ReloadingFile


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A file with a number."""
    (tmp_path / "number").write_text("1")
    return tmp_path / "number"


def test_changed_file_is_read_again(path: Path) -> None:
    """Whether it is overwritten or replaced, as in Kubernetes; an unchanged file is not read."""
    watched = ReloadingFile(int, path)
    assert (watched.current(), watched.update()) == (1, None)

    path.write_text("22")
    assert (watched.update(), watched.update(), watched.current()) == (22, None, 22)
    path.with_name("next").write_text("33")
    path.with_name("next").replace(path)
    assert watched.current() == 33


def test_unusable_file_keeps_the_last_value(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A missing or invalid file is reported once, until it is valid again."""
    watched = ReloadingFile(int, path)
    path.write_text("one")
    assert [watched.current() for _ in range(3)] == [1, 1, 1]
    path.unlink()
    assert [watched.current() for _ in range(3)] == [1, 1, 1]
    path.write_text("4")

    assert watched.current() == 4
    wrong, gone = [record.getMessage() for record in caplog.records if record.levelname == "ERROR"]
    assert f"can't use {path}: invalid literal" in wrong
    assert "No such file" in gone


def test_file_unusable_at_start_is_an_error(path: Path) -> None:
    """The error names the file."""
    path.write_text("one")

    with pytest.raises(OSError, match=f"can't use {path}: "):
        ReloadingFile(int, path)
