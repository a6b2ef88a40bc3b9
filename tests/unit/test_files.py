"""Folders that take a place, and checksums of files that others go by."""

from __future__ import annotations

import errno
import json
from pathlib import Path

import pytest

from llamaweft.errors import UserError
from llamaweft.files import (
    CHECKSUMS,
    check_recorded,
    digests,
    disk_is_full,
    forget,
    put_back,
    record,
    recorded,
    remove,
    take_place,
    write_recorded,
)


class KilledError(BaseException):
    """Stands for a kill: nothing after it runs."""


def folder_with(path: Path, text: str) -> Path:
    path.mkdir()
    (path / "file").write_text(text)
    return path


def kill_at_rename(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """Instead of the rename with this number."""
    real, done = Path.rename, []

    def rename(self: Path, target: Path) -> Path:
        done.append(self)
        if len(done) == number:
            raise KilledError
        return real(self, target)

    monkeypatch.setattr(Path, "rename", rename)


@pytest.mark.parametrize(("number", "found"), [(1, "old"), (2, "old"), (3, "new")])
def test_wherever_a_replacement_is_cut_short_one_of_the_two_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, found: str
) -> None:
    target = folder_with(tmp_path / "target", "old")
    aside = folder_with(tmp_path / ".target.new", "new")
    with monkeypatch.context() as patch:
        kill_at_rename(patch, number)
        try:
            take_place(aside, target)
        except KilledError:
            assert found == "old"
    put_back(target)
    assert (target / "file").read_text() == found
    if aside.exists():
        take_place(aside, target)
    assert (target / "file").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["target"]


def test_what_was_there_stays_where_the_new_one_cannot_be_renamed(tmp_path: Path) -> None:
    target = folder_with(tmp_path / "target", "old")
    with pytest.raises(OSError, match="No such file"):
        take_place(tmp_path / "missing", target)
    assert (target / "file").read_text() == "old"


def test_a_folder_that_is_being_deleted_is_not_taken_for_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = folder_with(tmp_path / "step-000001", "")
    with monkeypatch.context() as patch:
        patch.setattr("shutil.rmtree", lambda *_, **__: None)
        remove(folder)
    assert not folder.exists()
    folder_with(folder, "")
    remove(folder)
    assert not list(tmp_path.iterdir())


def test_a_file_that_changed_is_named(tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    write_recorded(file, "a: 1")
    check_recorded(file, tmp_path / "never recorded")
    file.write_text("a: 3")
    with pytest.raises(UserError, match=r"recipe\.yaml is damaged"):
        check_recorded(file)
    forget(file)
    check_recorded(file)


def test_a_file_of_a_folder_that_changed_is_named(tmp_path: Path) -> None:
    folder = folder_with(tmp_path / "adapter", "weights")
    (folder / "sub").mkdir()
    (folder / "sub/config").write_text("r: 4")
    record(folder)
    check_recorded(folder)
    (folder / "README.md").write_text("written by a person")
    check_recorded(folder)
    (folder / "sub/config").write_text("r: 5")
    with pytest.raises(UserError, match="adapter/sub/config is damaged"):
        check_recorded(folder)
    check_recorded(tmp_path / "adapt")  # no other name


def test_a_replacement_that_is_cut_short_damages_nothing(tmp_path: Path) -> None:
    """What is there is one of the two, and both have their checksums by then."""
    target = folder_with(tmp_path / "adapter", "old")
    record(target)
    aside = folder_with(tmp_path / ".adapter.new", "new")
    block = recorded(target, digests(aside, "adapter"))
    block.__enter__()
    check_recorded(target)
    take_place(aside, target)
    check_recorded(target)  # killed here, what is after the block is never done
    with recorded(target, digests(target)):
        pass
    check_recorded(target)
    (target / "file").write_text("old")
    with pytest.raises(UserError, match="is damaged"):
        check_recorded(target)


@pytest.mark.parametrize("text", ["{", "[]", '{"a": "b"}', '{"a": [1]}', b"\xff"])
def test_damaged_checksums_are_named(tmp_path: Path, text: str | bytes) -> None:
    content = text if isinstance(text, bytes) else text.encode()
    (tmp_path / CHECKSUMS).write_bytes(content)
    with pytest.raises(UserError, match=CHECKSUMS):
        check_recorded(tmp_path / "a")


def test_checksums_are_text_that_a_person_can_edit(tmp_path: Path) -> None:
    write_recorded(tmp_path / "a", "1")
    assert list(json.loads((tmp_path / CHECKSUMS).read_text())) == ["a"]


@pytest.mark.parametrize(
    ("error", "full"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), True),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), True),
        (Exception("I/O error: No space left on device (os error 28)"), True),
        (OSError(errno.EACCES, "Permission denied"), False),
        (ValueError("no"), False),
    ],
)
def test_a_full_disk_is_known_whatever_says_it(error: Exception, full: bool) -> None:
    assert disk_is_full(error) == full
