"""Meta's tokenizer.model through our reader and template against Meta's own ChatFormat."""

import random
from importlib.util import find_spec
from pathlib import Path

import pytest
from llama_models.datatypes import RawMessage
from llama_models.llama3.chat_format import ChatFormat
from llama_models.llama3.tokenizer import Tokenizer
from transformers import AutoTokenizer

from llamaweft.errors import UserError
from llamaweft.model.tokenizer import chat_template, load_tokenizer

META = Path(find_spec("llama_models").origin).parent
MODEL = META / "llama3" / "tokenizer.model"

TEXTS = [
    "Hello",
    "What is 2 + 2? 12345678901 3.14159 1,000,000 ½ ² ٣٤٥",
    "line one\nline two\n\n\nline five\r\n\r\nwindows\ttab",
    "def f(x):\n    if x > 1e-5:\n        return {'a': [1, 2]}\n    return None  # done",
    "Grüße aus Köln! Ça va? Ελληνικά, русский, עברית, العربية, हिन्दी, ไทย",
    "你好,世界。日本語のテキスト、한국어 텍스트",
    "🙂 👩‍👩‍👧‍👦 🇪🇺 ✈️ e\u0301 é \u200b|\u00a0|\u2003|",
    "I'LL don't WE'RE they've o'clock 'tis it'S",
    "a" * 300 + " " * 70 + "b" + "!" * 65 + "\n" * 9 + "end",
    "<b>html &amp; x</b> https://example.org/?q=1#2 C:\\path\\file <| not special |>",
    "",
]
EDGES = ["", " ", "   ", "\n", "\n\n", "\t", " \n ", "\r\n"]


@pytest.fixture(scope="module")
def ours():
    return load_tokenizer(MODEL)


@pytest.fixture(scope="module")
def theirs():
    return ChatFormat(Tokenizer(MODEL))


def dialogs():
    for text in TEXTS:
        yield [("user", text)]
        yield [("system", text), ("user", text)]
    yield [("system", "Be brief."), ("user", "Hi"), ("assistant", "Hello!"), ("user", "Bye")]
    yield [("user", "call"), ("assistant", "{}"), ("tool", '{"result": 7}')]
    pick = random.Random(0)
    for _ in range(200):
        turns = [("system", pick.choice(TEXTS))] * pick.randrange(2)
        for turn in range(pick.randrange(1, 8)):
            parts = [pick.choice(EDGES), *pick.choices(TEXTS, k=2), pick.choice(EDGES)]
            turns.append(("user" if turn % 2 == 0 else "assistant", pick.choice(EDGES).join(parts)))
        yield turns


def test_chats_have_metas_ids(ours, theirs):
    # Meta's code takes the text as it is given, Meta's description of the format and every
    # published template trim it; so the reference is given trimmed text.
    count = 0
    for turns in dialogs():
        reference = theirs.encode_dialog_prompt(
            [RawMessage(role=role, content=text.strip()) for role, text in turns]
        )
        chat = [{"role": role, "content": text} for role, text in turns]
        found = ours.apply_chat_template(chat, add_generation_prompt=True)["input_ids"]
        assert found == reference.tokens, turns
        text = ours.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
        assert ours(text, add_special_tokens=False)["input_ids"] == found
        count += 1
    assert count > 200


def test_without_a_generation_prompt_the_chat_ends_with_its_turn(ours):
    chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": " Hello\n"}]
    text = ours.apply_chat_template(chat, tokenize=False)
    assert text.endswith("<|start_header_id|>assistant<|end_header_id|>\n\nHello<|eot_id|>")


def test_plain_text_has_metas_ids(ours, theirs):
    for text in TEXTS + EDGES:
        expected = theirs.tokenizer.encode(text, bos=True, eos=False)
        assert ours(text)["input_ids"] == expected, text
        assert ours(text, add_special_tokens=False)["input_ids"] == expected[1:]
        assert ours.decode(expected[1:]) == text


def test_every_id_has_metas_bytes_and_name(ours, theirs):
    assert len(ours) == 128256
    special = theirs.tokenizer.special_tokens
    assert len(special) == 256
    assert ours.convert_tokens_to_ids(list(special)) == list(special.values())
    assert {i: t.content for i, t in ours.added_tokens_decoder.items()} == {
        index: name for name, index in special.items()
    }
    for index in range(0, 128000, 7):
        word = theirs.tokenizer.model.decode_single_token_bytes(index)
        assert ours.decode([index]) == word.decode("utf-8", errors="replace")


def test_bos_eos_pad(ours):
    assert (ours.bos_token_id, ours.eos_token_id, ours.pad_token_id) == (128000, 128009, 128004)
    assert (ours.bos_token, ours.eos_token) == ("<|begin_of_text|>", "<|eot_id|>")
    assert ours.pad_token == "<|finetune_right_pad_id|>"


def test_it_survives_saving(ours, tmp_path):
    ours.save_pretrained(tmp_path / "saved")
    saved = AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert saved.chat_template == ours.chat_template
    for text in TEXTS + EDGES:
        assert saved(text)["input_ids"] == ours(text)["input_ids"]
    chat = [{"role": "user", "content": TEXTS[1]}]
    assert saved.apply_chat_template(chat) == ours.apply_chat_template(chat)
    assert (saved.eos_token_id, saved.pad_token_id) == (128009, 128004)


def test_metas_folder_is_read_by_its_file(ours, tmp_path):
    (tmp_path / "tokenizer.model").symlink_to(MODEL)
    assert load_tokenizer(str(tmp_path))("Hi 1234")["input_ids"] == ours("Hi 1234")["input_ids"]


def test_templates_refuse_what_they_would_lose(ours):
    for template in (chat_template("llama3"), chat_template("chatml")):
        for content, more in [([{"type": "text", "text": "x"}], {}), ("x", {"tool_calls": [{}]})]:
            with pytest.raises(Exception, match="plain text"):
                ours.apply_chat_template(
                    [{"role": "user", "content": content, **more}], chat_template=template
                )


def test_chatml(ours):
    chat = [{"role": "user", "content": " Hi "}, {"role": "assistant", "content": "Yes"}]
    text = ours.apply_chat_template(
        chat, chat_template=chat_template("chatml"), tokenize=False, add_generation_prompt=True
    )
    assert text == (
        "<|im_start|>user\n Hi <|im_end|>\n<|im_start|>assistant\nYes<|im_end|>\n"
        "<|im_start|>assistant\n"
    )


def test_other_files_and_names_are_refused(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(b"\n\x0e\n\x05<unk>\x15\x00")
    (tmp_path / "short").write_text("IQ== 0\nIg== 1\n")
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken/tokenizer.json").write_text("{")
    cases = {
        str(META / "llama4" / "tokenizer.model"): "is not Llama 3's",
        str(tmp_path / "tokenizer.model"): "is not Llama 3's",
        str(tmp_path / "short"): "is not Llama 3's",
        str(tmp_path / "none"): "no such file or folder",
        "no-such-name": "no such file or folder",
        str(tmp_path / "empty"): "holds no tokenizer.json",
        str(tmp_path / "broken"): "cannot be loaded",
        "builtin:none": "is unknown",
    }
    for name, says in cases.items():
        with pytest.raises(UserError, match=says) as refused:
            load_tokenizer(name)
        assert name in str(refused.value)
