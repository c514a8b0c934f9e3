"""Names stay in their folder, hashes depend on content only, writes are whole."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from quietgoose.base.errors import NameRefused, SecurityError, StorageError
from quietgoose.base.files import check_writable, inside, safe_name, sha256_json, sha256_tensors, write_atomic


@pytest.mark.parametrize("name", ["../../x", "a/b", "a\0b", "", "x" * 300, "аpple", "CON", "nul", "a b", ".", "a\n"])
def test_bad_names_are_refused(name: str) -> None:
    with pytest.raises(NameRefused) as caught:
        safe_name(name)
    assert caught.value.code == "QG-SEC-002"
    assert caught.value.exit_code == 2


@given(st.text(max_size=80))
def test_whatever_is_accepted_is_a_plain_folder_name(name: str) -> None:
    try:
        safe_name(name)
    except NameRefused:
        return
    assert Path("/root", name).parent == Path("/root")
    assert name.isascii()


def test_paths_may_not_leave_their_folder(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "link").symlink_to(tmp_path)
    assert inside(tmp_path / "in", "a/b") == (tmp_path / "in" / "a" / "b").resolve()
    for bad in ("../x", "/etc/passwd", "link/x"):
        with pytest.raises(SecurityError):
            inside(tmp_path / "in", bad)


def test_tensor_hash_depends_on_names_dtypes_shapes_and_bytes_only() -> None:
    x = torch.arange(6.0).reshape(2, 3)
    base = sha256_tensors({"x": x})
    assert base == sha256_tensors({"x": x.t().contiguous().t()})
    others = [{"y": x}, {"x": x.reshape(3, 2)}, {"x": x.to(torch.bfloat16)}, {"x": x + 1e-3}]
    assert len({base, *map(sha256_tensors, others)}) == 5
    assert sha256_json({"a": 1, "b": 2}) == sha256_json({"b": 2, "a": 1})


def test_a_write_leaves_no_staging_file(tmp_path: Path) -> None:
    write_atomic(tmp_path / "f", "old")
    write_atomic(tmp_path / "f", "new")
    assert (tmp_path / "f").read_text() == "new"
    assert [p.name for p in tmp_path.iterdir()] == ["f"]


def test_a_place_that_can_be_written_is_left_as_it_was(tmp_path: Path) -> None:
    (tmp_path / "there").write_text("old")
    check_writable(tmp_path / "there", "--out")
    check_writable(tmp_path / "a" / "b" / "c.json", "--out")
    check_writable(tmp_path / "a", "--out", folder=True)
    check_writable(tmp_path, "--out", folder=True)
    assert [path.name for path in tmp_path.iterdir()] == ["there"]
    assert (tmp_path / "there").read_text() == "old"


@pytest.mark.parametrize(
    ("place", "folder", "why"),
    [
        ("file/x/y.json", False, "Not a directory: .*file"),
        ("file/x", True, "Not a directory: .*file"),
        ("file", True, "file is no folder"),
        ("in", False, "in is a folder"),
        ("n" * 300, False, "File name too long"),
    ],
)
def test_a_place_that_cannot_be_written_is_refused_by_name(tmp_path: Path, place: str, folder: bool, why: str) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "in").mkdir()
    with pytest.raises(StorageError, match=f"QG-IO-010 --out it: cannot be written there .*{why}") as caught:
        check_writable(tmp_path / place, "--out it", folder=folder)
    assert caught.value.exit_code == 6


def test_a_folder_that_nobody_may_write_is_refused() -> None:
    with pytest.raises(StorageError, match="QG-IO-010 --out: "):  # of the kernel: refused to the superuser too
        check_writable(Path("/proc/self/x.json"), "--out")
