"""Names stay in their folder, hashes depend on content only, writes are whole."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from quietgoose.base.errors import NameRefused, SecurityError
from quietgoose.base.files import inside, safe_name, sha256_json, sha256_tensors, write_atomic


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
