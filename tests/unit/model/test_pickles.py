"""Pickled weights: tensors are read, and nothing that a pickle says is ever done."""

from __future__ import annotations

import io
import os
import pickle
import zipfile
from collections import OrderedDict
from pathlib import Path

import pytest
import torch

from llamaweft.errors import UserError
from llamaweft.model.pickles import common_dtype, mapped_tensors


class Calls:
    """A pickle that calls a function as soon as it is read."""

    def __init__(self, *call) -> None:
        self.call = call

    def __reduce__(self):
        return self.call[0], self.call[1:]


def saved(content: object, path: Path) -> Path:
    torch.save(content, path)
    return path


def test_tensors_come_back_as_they_are_and_mapped(tmp_path):
    given = OrderedDict(
        a=torch.randn(3, 4), b=torch.randn(5).bfloat16(), c=torch.nn.Parameter(torch.ones(2).half())
    )
    found = mapped_tensors(saved(given, tmp_path / "w.pth"))
    assert list(found) == ["a", "b", "c"]
    assert all(torch.equal(found[name], given[name]) for name in given)
    assert all(found[name].dtype == given[name].dtype for name in given)
    maps = Path("/proc/self/maps")
    if maps.exists():
        assert str(tmp_path / "w.pth") in maps.read_text()


@pytest.mark.parametrize("where", ["beside", "name", "alone"])
@pytest.mark.parametrize("function", [os.system, exec])
def test_code_in_a_pickle_does_not_run(tmp_path, where, function):
    marker = tmp_path / "ran"
    says = {os.system: f"touch {marker}", exec: f"open({str(marker)!r}, 'w')"}[function]
    evil = Calls(function, says)
    content = {"beside": {"a": torch.ones(2), "b": evil}, "name": {"a": [evil]}, "alone": evil}[
        where
    ]
    path = saved(content, tmp_path / "evil.pth")
    with pytest.raises(
        UserError, match=r"asks for \S*(system|exec) to be called, and code .* never run"
    ):
        mapped_tensors(path)
    assert not marker.exists()
    pickle.loads(pickle.dumps(evil))  # and it would have run
    assert marker.exists()


def test_a_switch_of_torch_does_not_open_the_door(tmp_path, monkeypatch):
    marker = tmp_path / "ran"
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    path = saved({"a": Calls(os.system, f"touch {marker}")}, tmp_path / "evil.pth")
    with pytest.raises(UserError, match="never run"):
        mapped_tensors(path)
    assert not marker.exists()


SPARSE = torch.ones(2, 2).to_sparse()


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ([torch.ones(2)], "holds list and not names"),
        (torch.ones(2), "holds Tensor and not names"),
        ({"a": {"b": torch.ones(2)}}, "holds dict under 'a' and no tensor"),
        ({"a": 3}, "holds int under 'a'"),
        ({3: torch.ones(2)}, "holds the name '3', which is no text"),
        ({"a\nerror: b": torch.ones(2)}, r"holds the name 'a\\nerror: b', which cannot be shown"),
        ({"a": SPARSE}, "as no plain tensor"),
        ({"a": torch.ones(2, dtype=torch.int64)}, "in torch.int64, and weights are read from"),
        ({"a": torch.ones(1).expand(10**12)}, "as a view of other numbers"),
        ({"a": torch.ones(4, 3).T}, "as a view of other numbers"),
    ],
)
def test_anything_but_names_and_plain_tensors_is_refused(tmp_path, content, says):
    path = saved(content, tmp_path / "w.bin")
    with pytest.raises(UserError, match=says) as refused:
        mapped_tensors(path)
    assert str(path) in str(refused.value)
    assert "safetensors" in str(refused.value)


def test_cut_and_foreign_files_are_refused(tmp_path):
    whole = saved({"a": torch.randn(100, 100)}, tmp_path / "whole.pth").read_bytes()
    cases = {
        "half": (whole[: len(whole) // 2], "cut short or damaged"),
        "tail": (whole[:-10], "cut short or damaged"),
        "empty": (b"", "no archive of torch.save"),
        "text": (b"hello", "no archive of torch.save"),
        "pickle": (pickle.dumps({"a": 1}), "no archive of torch.save"),
    }
    for name, (data, says) in cases.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(UserError, match=says):
            mapped_tensors(tmp_path / name)
    torch.save({"a": torch.ones(2)}, tmp_path / "old", _use_new_zipfile_serialization=False)
    with pytest.raises(UserError, match=r"torch 1\.6 and later"):
        mapped_tensors(tmp_path / "old")
    with pytest.raises(UserError, match="is missing"):
        mapped_tensors(tmp_path / "none")
    with pytest.raises(UserError, match="cannot be read"):
        mapped_tensors(tmp_path)


def rewritten(path: Path, change) -> Path:
    """The same archive with members changed: `change` gives (bytes, compression) for each."""
    members = {}
    with zipfile.ZipFile(path) as archive:
        for info in archive.infolist():
            members[info.filename] = archive.read(info)
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for name, data in members.items():
            data, kind = change(name, data)
            archive.writestr(zipfile.ZipInfo(name), data, kind)
    path.write_bytes(out.getvalue())
    return path


def test_a_packed_or_endless_pickle_is_refused_unread(tmp_path):
    path = saved({"a": torch.ones(2)}, tmp_path / "w.pth")

    def packed(name, data):
        return data, zipfile.ZIP_DEFLATED if name.endswith(".pkl") else zipfile.ZIP_STORED

    with pytest.raises(UserError, match="packed, as torch never does"):
        mapped_tensors(rewritten(path, packed))

    def long(name, data):
        more = b"\0" * (65 * 2**20) if name.endswith(".pkl") else b""
        return data + more, zipfile.ZIP_STORED

    path = saved({"a": torch.ones(2)}, tmp_path / "w.pth")
    with pytest.raises(UserError, match="a pickle of 65 MiB"):
        mapped_tensors(rewritten(path, long))


def test_mixed_dtypes_are_held_by_fp32():
    bf16, half = torch.ones(1).bfloat16(), torch.ones(1).half()
    assert common_dtype([bf16, bf16]) == torch.bfloat16
    assert common_dtype([half]) == torch.float16
    assert common_dtype([bf16, half]) == torch.float32
