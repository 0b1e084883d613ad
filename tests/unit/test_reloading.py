"""Files that change while the server runs."""

from pathlib import Path

import pytest

from service.auth.reloading import ReloadingFile


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A file with a number in it."""
    (tmp_path / "number").write_text("1")
    return tmp_path / "number"


def test_what_is_in_a_file_is_read_again_when_it_changes(path: Path) -> None:
    """Written over, or another in its place as Kubernetes does it; and not while it stays."""
    watched = ReloadingFile(int, path)
    assert (watched.current(), watched.update()) == (1, None)

    path.write_text("22")
    assert (watched.update(), watched.update(), watched.current()) == (22, None, 22)
    path.with_name("next").write_text("33")
    path.with_name("next").replace(path)
    assert watched.current() == 33


def test_what_can_t_be_used_changes_nothing_and_is_told_once(
    path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A file that is gone, or is not what it should be: until it is right again."""
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


def test_what_can_t_be_used_at_first_is_an_error(path: Path) -> None:
    """With the file's name."""
    path.write_text("one")

    with pytest.raises(OSError, match=f"can't use {path}: "):
        ReloadingFile(int, path)
