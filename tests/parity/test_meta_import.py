"""Meta's layout, read by us: bit-equal to transformers' own conversion script (as it was recorded
by record_meta_import.py), and answering like Meta's own model on Meta's own merge of the shards."""

from __future__ import annotations

import json
import sys
import types
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from meta_folder import TINY, sliced, whole_tensors, write_meta, write_tokenizer
from torch import nn

from llamaweft.model.load import load_causal_lm
from llamaweft.model.locate import find_folder
from llamaweft.model.meta import convert_meta
from llamaweft.model.pack import Pack
from llamaweft.model.tokenizer import load_tokenizer

sys.path.insert(0, str(Path(__file__).parent))
from record_meta_import import CASES, RECORD, digests

TOKENIZER = Path(find_spec("llama_models").origin).parent / "llama3" / "tokenizer.model"


@pytest.fixture(scope="module")
def small_tokenizer(tmp_path_factory) -> str:
    return str(write_tokenizer(tmp_path_factory.mktemp("tokenizer")))


@pytest.mark.parametrize("case", CASES)
def test_every_bit_and_key_is_that_of_transformers_script(case, small_tokenizer, tmp_path):
    _, params, vocab, slices = CASES[case]
    source = write_meta(tmp_path / "meta", params, vocab, **slices)
    convert_meta(source, tmp_path / "ours", small_tokenizer)
    expected = json.loads(RECORD.read_text())[case]
    assert digests(tmp_path / "ours") == expected["tensors"]
    ours = json.loads((tmp_path / "ours" / "config.json").read_text())
    # The ids are those of the tokenizer, which here is a small one.
    ids = ("bos_token_id", "eos_token_id")
    wanted = {key: value for key, value in expected["config"].items() if key not in ids}
    assert {key: ours.get(key) for key in wanted} == wanted
    assert ours["dtype"] == "bfloat16"


def test_llama3s_tokenizer_comes_along_with_its_ids(tmp_path, monkeypatch):
    from llama_models.llama3.tokenizer import Tokenizer

    monkeypatch.setenv("LLAMAWEFT_CACHE", str(tmp_path / "cache"))
    params = TINY | {"dim": 16, "vocab_size": 128256, "use_scaled_rope": True, "rope_theta": 5e5}
    source = write_meta(tmp_path / "meta", params, 128256)
    (tmp_path / "tokenizer.model").symlink_to(TOKENIZER)  # one folder above, as Meta's download
    folder = find_folder(str(source))  # as a recipe takes it
    assert folder.is_relative_to(tmp_path / "cache")
    config = json.loads((folder / "config.json").read_text())
    recorded = json.loads(RECORD.read_text())["llama3.1"]["config"]
    assert config["bos_token_id"] == recorded["bos_token_id"] == 128000
    assert config["eos_token_id"] == recorded["eos_token_id"] == [128001, 128008, 128009]
    theirs, ours = Tokenizer(TOKENIZER), load_tokenizer(folder)
    for text in ("Hello, world! 12345", "Grüße 你好 🙂\n\n  end", " x"):
        assert ours(text)["input_ids"] == theirs.encode(text, bos=True, eos=False)


def _fairscale(monkeypatch) -> None:
    """What Meta's code asks of fairscale, on one device."""

    class Parallel(nn.Linear):
        def __init__(self, inside, outside, bias=True, **_):
            super().__init__(inside, outside, bias=bias)

    class Vocabulary(nn.Embedding):
        def __init__(self, rows, columns, **_):
            super().__init__(rows, columns)

    initialize = types.ModuleType("fairscale.nn.model_parallel.initialize")
    initialize.get_model_parallel_world_size = lambda: 1
    initialize.get_model_parallel_rank = lambda: 0
    layers = types.ModuleType("fairscale.nn.model_parallel.layers")
    layers.ColumnParallelLinear = layers.RowParallelLinear = Parallel
    layers.VocabParallelEmbedding = Vocabulary
    parallel = types.ModuleType("fairscale.nn.model_parallel")
    parallel.initialize, parallel.layers = initialize, layers
    for name in ("fairscale", "fairscale.nn"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    for module in (parallel, initialize, layers):
        monkeypatch.setitem(sys.modules, module.__name__, module)


class _Tokens:
    def __init__(self, ids: np.ndarray) -> None:
        self.ids, self.weights = ids, np.zeros(len(ids), np.float32)


@pytest.mark.parametrize("shards", [1, 2])
def test_it_answers_like_metas_own_model(shards, small_tokenizer, tmp_path, monkeypatch):
    # fp32; the order of summation differs.
    _fairscale(monkeypatch)
    from llama_models.checkpoint import reshard_mp
    from llama_models.llama3.args import ModelArgs
    from llama_models.llama3.model import Transformer

    params = TINY | {"n_kv_heads": 2, "rope_theta": 5e5, "use_scaled_rope": True, "vocab_size": 96}
    source = write_meta(tmp_path / "meta", params, 96, shards=shards, dtype=torch.float32)
    convert_meta(source, tmp_path / "ours", small_tokenizer)

    parts = sliced(whole_tensors(params, 96, dtype=torch.float32), shards, 0)
    reference = Transformer(ModelArgs(**params, max_seq_len=64, max_batch_size=1))
    reference.load_state_dict(reshard_mp(parts, size=1, rank=0))
    ids = (np.arange(40) * 7 % 96).astype(np.int64)
    theirs_TV = reference(torch.from_numpy(ids)[None], 0)[0]

    model = load_causal_lm(tmp_path / "ours", base_weights=None)
    with torch.no_grad():
        ours_TV = model(Pack.from_documents([_Tokens(ids)]))
    assert float((ours_TV - theirs_TV).norm() / theirs_TV.norm()) < 1e-5
