"""Meta's layout: shards put together, params.json read, and everything that does not fit refused."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from meta_folder import TINY, numbers, whole_tensors, write_meta, write_tokenizer
from safetensors.torch import load_file

from llamaweft.errors import UserError
from llamaweft.model.folder import read_config
from llamaweft.model.locate import find_folder
from llamaweft.model.meta import convert_meta

GROUPED = TINY | {"n_kv_heads": 4, "n_heads": 8}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> str:
    return str(write_tokenizer(tmp_path_factory.mktemp("tokenizer")))


def written(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize("shards", [1, 2, 4])
@pytest.mark.parametrize("side", [0, 1])
def test_however_it_was_sliced_it_is_the_same_model(tokenizer, tmp_path, shards, side):
    source = write_meta(tmp_path / "meta", GROUPED, 96, shards=shards, embedding_side=side)
    convert_meta(source, tmp_path / "ours", tokenizer)
    found, whole = written(tmp_path / "ours"), whole_tensors(GROUPED, 96)
    assert torch.equal(found["model.embed_tokens.weight"], whole["tok_embeddings.weight"])
    assert torch.equal(found["lm_head.weight"], whole["output.weight"])
    for ours, theirs in {
        "self_attn.v_proj": "attention.wv",
        "self_attn.o_proj": "attention.wo",
        "mlp.gate_proj": "feed_forward.w1",
        "mlp.down_proj": "feed_forward.w2",
        "mlp.up_proj": "feed_forward.w3",
        "post_attention_layernorm": "ffn_norm",
    }.items():
        name = f"model.layers.1.{ours}.weight"
        assert torch.equal(found[name], whole[f"layers.1.{theirs}.weight"]), name
    # Of the first query head, rows 0, 2, 4 ... then rows 1, 3, 5 ...
    q, given = (
        found["model.layers.0.self_attn.q_proj.weight"],
        whole["layers.0.attention.wq.weight"],
    )
    assert torch.equal(q[:8], torch.cat([given[:8:2], given[1:8:2]]))
    assert len(found) == len(whole)


def test_wide_tensors_are_written_in_chunks(tokenizer, tmp_path, monkeypatch):
    from llamaweft.weights import build

    monkeypatch.setattr(build, "CHUNK_BYTES", 1000)
    source = write_meta(tmp_path / "meta", GROUPED, 96, shards=2, embedding_side=1)
    convert_meta(source, tmp_path / "ours", tokenizer)
    found, whole = written(tmp_path / "ours"), whole_tensors(GROUPED, 96)
    assert torch.equal(found["model.embed_tokens.weight"], whole["tok_embeddings.weight"])
    name = "layers.0.feed_forward.w2.weight"
    assert torch.equal(found["model.layers.0.mlp.down_proj.weight"], whole[name])


@pytest.mark.parametrize("how", ["equal", "absent", "shared"])
def test_a_head_that_is_the_embedding_is_not_kept_twice(tokenizer, tmp_path, how):
    scaled = GROUPED | {"use_scaled_rope": True}
    source = write_meta(tmp_path / "meta", scaled, 96, tied=True)
    path = source / "consolidated.00.pth"
    held = torch.load(path, weights_only=True)
    if how == "absent":
        del held["output.weight"]
    if how == "shared":
        held["output.weight"] = held["tok_embeddings.weight"]
    torch.save(held, path)
    convert_meta(source, tmp_path / "ours", tokenizer)
    config = read_config(tmp_path / "ours")
    assert config.tie_word_embeddings
    assert config.rope_scaling["factor"] == 32.0
    assert "lm_head.weight" not in written(tmp_path / "ours")


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_numbers_keep_their_dtype_and_frequencies_are_left(tokenizer, tmp_path, dtype):
    source = write_meta(tmp_path / "meta", TINY, 96, dtype=dtype)
    path = source / "consolidated.00.pth"
    held = torch.load(path, weights_only=True)
    torch.save(held | {"rope.freqs": torch.ones(8)}, path)
    convert_meta(source, tmp_path / "ours", tokenizer)
    assert {tensor.dtype for tensor in written(tmp_path / "ours").values()} == {dtype}
    config = json.loads((tmp_path / "ours/config.json").read_text())
    assert config["dtype"] == str(dtype).removeprefix("torch.")


def test_it_is_converted_once_and_anew_when_a_file_has_changed(tmp_path, monkeypatch):
    from llamaweft.model import convert

    made = []
    monkeypatch.setenv("LLAMAWEFT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(convert, "convert", lambda _, folder: made.append(folder.mkdir()))
    source = write_meta(tmp_path / "meta", TINY, 96)
    folder = find_folder(str(source))
    assert folder.is_relative_to(tmp_path / "cache")
    assert find_folder(str(source)) == folder
    assert len(made) == 1
    os.utime(source / "consolidated.00.pth", (1, 1))
    assert find_folder(str(source)) != folder
    (tmp_path / "tokenizer.model").write_text("another")
    find_folder(str(source))
    assert len(made) == 3


PARAMS = {
    "n_layers": ({"n_layers": None}, "n_layers is None, but must be a whole number"),
    "dim": ({"dim": "64"}, "dim is 64, but must be a whole number"),
    "bool": ({"n_heads": True}, "n_heads is True"),
    "odd": ({"n_heads": 7}, "is not a multiple of"),
    "eps": ({"norm_eps": 0}, "norm_eps is 0, but must be a number above zero"),
    "nan": ({"rope_theta": float("nan")}, "rope_theta is nan"),
    "factor": ({"ffn_dim_multiplier": 1e300}, "ffn_dim_multiplier is 1e"),
    "many": ({"n_layers": 10**9}, "no more than 4096"),
    "scaled": ({"use_scaled_rope": "yes"}, "use_scaled_rope is 'yes'"),
    "vocabulary": ({"vocab_size": 97}, "vocab_size is 97, and the embedding has 96 rows"),
    "quantised": ({"quantization_args": {"scheme": "int4"}}, "quantization_args is .* not built"),
    "experts": ({"moe": {"num_experts": 8}}, "moe is .* not built"),
}


@pytest.mark.parametrize("case", PARAMS)
def test_a_shape_that_makes_no_sense_is_refused(tokenizer, tmp_path, case):
    change, says = PARAMS[case]
    source = write_meta(tmp_path / "meta", TINY, 96)
    (source / "params.json").write_text(json.dumps(TINY | change))
    with pytest.raises(UserError, match=says) as refused:
        convert_meta(source, tmp_path / "ours", tokenizer)
    assert "params.json" in str(refused.value)
    assert not (tmp_path / "ours").exists()


def test_broken_params_are_refused(tokenizer, tmp_path):
    source = write_meta(tmp_path / "meta", TINY, 96)
    for text, says in [
        ("{", "cannot be read"),
        ("[" * 100_000, "cannot be read"),
        ("3", "mapping"),
    ]:
        (source / "params.json").write_text(text)
        with pytest.raises(UserError, match=says):
            convert_meta(source, tmp_path / "ours", tokenizer)
    (source / "params.json").unlink()
    with pytest.raises(UserError, match=r"params\.json is missing"):
        convert_meta(source, tmp_path / "ours", tokenizer)


def _drop(held):
    del held["layers.1.feed_forward.w3.weight"]


def _add(held):
    held["layers.2.attention.wq.weight"] = numbers((64, 64), 1)


def _reshape(held):
    held["layers.0.attention.wo.weight"] = numbers((64, 64), 1)


def _norm(held):
    held["norm.weight"] = numbers((65,), 1)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (_drop, r"consolidated\.01\.pth lacks the tensor layers\.1\.feed_forward\.w3\.weight"),
        (_add, r"consolidated\.01\.pth holds layers\.2\.attention\.wq\.weight, which is not part"),
        (_reshape, r"consolidated\.01\.pth: layers\.0\.attention\.wo\.weight has shape \(64, 64\)"),
        (_norm, r"consolidated\.01\.pth: norm\.weight has shape \(65,\)"),
    ],
)
def test_a_shard_that_does_not_fit_is_named(tokenizer, tmp_path, change, says):
    source = write_meta(tmp_path / "meta", GROUPED, 96, shards=2)
    path = source / "consolidated.01.pth"
    held = torch.load(path, weights_only=True)
    change(held)
    torch.save(held, path)
    with pytest.raises(UserError, match=says):
        convert_meta(source, tmp_path / "ours", tokenizer)


def test_missing_shards_and_too_many_are_refused(tokenizer, tmp_path):
    source = write_meta(tmp_path / "meta", GROUPED, 96, shards=4)
    (source / "consolidated.02.pth").rename(tmp_path / "away")
    with pytest.raises(UserError, match=r"consolidated\.02\.pth is missing"):
        convert_meta(source, tmp_path / "ours", tokenizer)
    (source / "consolidated.03.pth").unlink()  # the last ones: only the shapes tell
    with pytest.raises(UserError, match="in 2 shards"):
        convert_meta(source, tmp_path / "ours", tokenizer)
    source = write_meta(tmp_path / "eight", GROUPED, 96, shards=8)
    with pytest.raises(UserError, match="8 shards for 4 key-value heads"):
        convert_meta(source, tmp_path / "ours", tokenizer)


def test_the_tokenizer_is_asked_for_where_it_is_no_use(tokenizer, tmp_path):
    source = write_meta(tmp_path / "meta", TINY, 96)
    with pytest.raises(UserError, match=r"holds no tokenizer\.model; .*--tokenizer T"):
        convert_meta(source, tmp_path / "ours")
    (source / "tokenizer.model").write_bytes(b"\n\x0e\n\x05<unk>\x15\x00")
    with pytest.raises(UserError, match=r"tokenizer\.model is not Llama 3's; .*--tokenizer T"):
        convert_meta(source, tmp_path / "ours")
    large = write_tokenizer(tmp_path / "large", words=97)
    with pytest.raises(UserError, match=r"97 tokens and the model in .* 96"):
        convert_meta(source, tmp_path / "ours", str(large))


def test_room_is_asked_for_first(tokenizer, tmp_path, monkeypatch):
    source = write_meta(tmp_path / "meta", TINY, 96)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(UserError, match=r"the model converted from .* needs"):
        convert_meta(source, tmp_path / "ours", tokenizer)
    assert not (tmp_path / "ours").exists()
