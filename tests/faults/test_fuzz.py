"""A few hundred damaged files of each kind: each ends in what it holds or in one sentence. Many more:
`python tests/faults/fuzz_files.py`."""

from __future__ import annotations

from pathlib import Path

import pytest
from fuzz_files import tried
from fuzz_targets import TARGETS, Target

CASES = {
    "recipe": 100,
    "checkpoint": 300,
    "gguf": 100,
    "model folder": 100,
    "meta folder": 60,
    "adapter": 200,
    "rows": 300,
}


@pytest.mark.parametrize("kind", TARGETS, ids=lambda kind: kind.name)
def test_what_is_damaged_ends_in_one_sentence(
    kind: type[Target], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LLAMAWEFT_CACHE", str(tmp_path / "cache"))
    target = kind(tmp_path)
    target.check_valid()
    ended = [tried(target, 0, case) for case in range(CASES[kind.name])]
    assert not [f"case {case}: {how}" for case, how in enumerate(ended) if how.startswith("FAILED")]
    assert "refused" in ended
