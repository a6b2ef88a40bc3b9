"""Code that comes with a model is never run: the folder is opened without it, or refused."""

from __future__ import annotations

import builtins
import contextlib
import json
import shutil
from pathlib import Path

import pytest

from llamaweft.errors import UserError
from llamaweft.model.folder import read_config
from llamaweft.model.load import load_causal_lm
from llamaweft.model.locate import find_folder
from llamaweft.model.tokenizer import load_tokenizer

EVIL = """
from pathlib import Path
Path({marker!r}).write_text("ran")
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
class EvilConfig(LlamaConfig): pass
class EvilModel(LlamaForCausalLM): pass
class EvilTokenizer(PreTrainedTokenizerFast): pass
"""


@pytest.fixture
def planted(tiny_folder: Path, tmp_path: Path, monkeypatch) -> Path:
    """The tiny model with code beside it, which every config names; nobody is there to be asked."""
    folder = tmp_path / "planted"
    shutil.copytree(tiny_folder, folder)
    for place in (folder, folder / "tokenizer"):
        place.mkdir(exist_ok=True)
        (place / "evil.py").write_text(EVIL.format(marker=str(tmp_path / "ran")))
    (folder / "__init__.py").write_text(EVIL.format(marker=str(tmp_path / "ran")))
    named = {"AutoConfig": "evil.EvilConfig", "AutoModelForCausalLM": "evil.EvilModel"}
    change(folder / "config.json", auto_map=named)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))

    def asked(*_):
        raise AssertionError("a person was asked whether to run the code")

    monkeypatch.setattr(builtins, "input", asked)
    return folder


def change(path: Path, **keys: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | keys))


def test_a_model_with_code_of_its_own_is_opened_without_it(planted, tmp_path):
    assert find_folder(str(planted)) == planted
    assert load_causal_lm(planted, base_weights=None).config == read_config(planted)
    assert len(load_tokenizer(planted)) == read_config(planted).vocab_size
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("kind", ["PreTrainedTokenizerFast", "EvilTokenizer"])
def test_a_tokenizer_with_code_of_its_own_is_opened_without_it_or_refused(planted, tmp_path, kind):
    named = {"AutoTokenizer": ["evil.EvilTokenizer", "evil.EvilTokenizer"]}
    change(planted / "tokenizer_config.json", auto_map=named, tokenizer_class=kind)
    with contextlib.suppress(UserError):
        assert len(load_tokenizer(planted)) == read_config(planted).vocab_size
    assert not (tmp_path / "ran").exists()


def test_another_architecture_with_code_is_refused(planted, tmp_path):
    change(planted / "config.json", model_type="evil")
    with pytest.raises(UserError, match="only 'llama' is built"):
        read_config(planted)
    assert not (tmp_path / "ran").exists()
