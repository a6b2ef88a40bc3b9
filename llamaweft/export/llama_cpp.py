"""An export opened by llama.cpp, through the wheel `xllamacpp` that carries it built.

llama.cpp's server tells the log-probabilities of every token of the vocabulary at the end of a
prompt: logits but for a constant. So each compared position is a prompt of its own; what it shares
with the one before is kept in the server's cache.

P: positions that are compared   V: vocabulary
"""

from __future__ import annotations

import importlib.util
import json
import os
import secrets
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from llamaweft.errors import RunError, UserError
from llamaweft.export.llama_cpp_server import ADDRESS, KEY
from llamaweft.export.parity import Answers, compared_positions

POSITIONS = 8
"""Positions of a prompt that are asked: each answer is a list of the whole vocabulary."""

BATCH_TOKENS = 64
FLOOR = -100.0
"""A probability that fp32 rounds to 0 has no logarithm; e^-100 is about the smallest it holds."""

PATIENCE_SECONDS = 600
STEERED = 1000.0
"""Bias of the token that is drawn, so that what is drawn ends no text and is whole."""

CHAT = (
    {"role": "user", "content": "What is 12 + 30?"},
    {"role": "assistant", "content": "42."},
    {"role": "user", "content": "And in words?"},
)
"""A chat whose ids must be the same."""

TEXTS = (
    "Hello, world!",
    "  two spaces, a\ttab\n\n\nand lines \r\n at the end  ",
    "In 2024 it was 12345678901 and 3.14159, don't you'LL think?",
    "héllo wörld, naïve café: Ångström, ½ ﬁn",
    "你好,世界。日本語のテキスト 한국어 العربية हिन्दी",
    "🙂👩‍👩‍👧 \U0001f1e9\U0001f1ea ➜ \u200b\u00a0x",
    "def f(x):\n    return {'a': [x ** 2 for _ in range(10)]}  # ok\n",
    "https://example.org/a?b=c&d=%20 user@example.org",
    "A" * 40 + " " + "-" * 30 + "    ",
)
"""Texts whose ids must be the same; special tokens are added to them."""

SPECIAL_TEXTS = 64
"""So many special tokens at most are tried in a text each."""


def check_llama_cpp() -> None:
    """Raises UserError when the wheel is not installed."""
    if importlib.util.find_spec("xllamacpp") is None:
        raise UserError(
            "xllamacpp is not installed, so the GGUF cannot be proven with llama.cpp; "
            "pip install xllamacpp, or export with --no-verify"
        )


def in_llama_cpp(
    path: Path,
    tokenizer: Any,
    adds_begin: bool,
    chat: str | None,
    vocab_size: int,
    prompts: Sequence[np.ndarray],
) -> Answers:
    """What a GGUF file says, and whether it reads texts as `tokenizer` does.

    adds_begin: whether the file tells llama.cpp to put what the tokenizer puts around a text. chat:
    CHAT as the chat template writes it, up to the next answer; None without a template.
    Raises UserError when the wheel is missing, RunError when llama.cpp does not open the file.
    """
    check_llama_cpp()
    context = max(len(ids) for ids in prompts) + 8
    with _server(path, context) as server:
        steered = tokenizer.encode("a", add_special_tokens=False)[0]
        given = [_asked(len(ids)) for ids in prompts]
        logits = [
            _rows(server, ids, compared_positions(len(ids))[places], vocab_size, steered)
            for ids, places in zip(prompts, given, strict=True)
        ]
        texts = [*TEXTS, *_special_texts(tokenizer)]
        ours = {text: tokenizer.encode(text, add_special_tokens=adds_begin) for text in texts}
        other = [text for text in texts if server.ids(text) != ours[text]]
        if chat is not None:
            texts.append(chat)
            trained = tokenizer.encode(chat, add_special_tokens=False)
            if server.ids(server.written(CHAT)) != trained:
                other.append(chat)
    name = f"llama.cpp (xllamacpp {_version()})"
    return Answers(
        name, logits, given=given, centred=True, texts=len(texts), other_ids=tuple(other)
    )


def _asked(tokens: int) -> Tensor:
    """Which of `compared_positions` are asked, by their places in it."""
    count = len(compared_positions(tokens))
    return torch.linspace(0, count - 1, min(count, POSITIONS)).round().long()


def _rows(
    server: _Server, ids: np.ndarray, positions_P: Tensor, vocab_size: int, steered: int
) -> Tensor:
    """log_p_PV after each of these positions."""
    given = [int(token) for token in ids]
    rows = [
        server.log_probabilities(given[: int(at) + 1], vocab_size, steered) for at in positions_P
    ]
    return torch.from_numpy(np.stack(rows))


def _special_texts(tokenizer: Any) -> list[str]:
    added = [token.content for token in tokenizer.added_tokens_decoder.values()]
    return [f"one {text} two{text}{text}" for text in added[:SPECIAL_TEXTS]]


def _version() -> str:
    from importlib.metadata import version

    return version("xllamacpp")


@dataclass(frozen=True)
class _Server:
    """A running server."""

    address: str
    key: str

    def ids(self, text: str) -> list[int]:
        """Of a text with what the tokenizer puts around it; special tokens are read as such."""
        asked = {"content": text, "add_special": True, "parse_special": True}
        found: list[int] = self._post("/tokenize", asked)["tokens"]
        return found

    def written(self, messages: Sequence[dict[str, str]]) -> str:
        """A chat by the template in the file, up to the next answer, as llama.cpp hands it to its
        tokenizer."""
        prompt: str = self._post("/apply-template", {"messages": list(messages)})["prompt"]
        return prompt

    def log_probabilities(self, ids: list[int], vocab_size: int, steered: int) -> np.ndarray:
        """log_p_V of what follows."""
        asked = {
            "prompt": ids,
            "n_predict": 1,
            "n_probs": vocab_size,
            "temperature": 0,
            "logit_bias": [[steered, STEERED]],
            "cache_prompt": True,
        }
        told = self._post("/completion", asked)["completion_probabilities"][0]["top_logprobs"]
        log_p_V = np.full(vocab_size, FLOOR, np.float32)
        log_p_V[[one["id"] for one in told]] = [one["logprob"] for one in told]
        return log_p_V.clip(FLOOR)

    def _post(self, path: str, content: dict[str, Any]) -> Any:
        request = urllib.request.Request(
            f"{self.address}{path}",
            json.dumps(content).encode(),
            {"Content-Type": "application/json", "Authorization": f"Bearer {self.key}"},
        )
        # It is on this machine: no proxy is asked.
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        try:
            with opener.open(request, timeout=PATIENCE_SECONDS) as answer:
                return json.loads(answer.read())
        except urllib.error.HTTPError as error:
            said = error.read().decode(errors="replace")[:300]
            raise RunError(f"llama.cpp refuses {path}: {said}") from None
        except (OSError, ValueError) as error:
            raise RunError(f"llama.cpp ended while it was asked for {path} ({error})") from None


@contextmanager
def _server(path: Path, context_tokens: int) -> Iterator[_Server]:
    """llama.cpp on a file, until the block ends."""
    key = secrets.token_hex(16)
    settings = {
        "model": str(path),
        "context_tokens": context_tokens,
        "batch_tokens": BATCH_TOKENS,
        "threads": torch.get_num_threads(),
    }
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "llamaweft.export.llama_cpp_server", json.dumps(settings)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            env=os.environ | {KEY: key},
        )
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            lines = iter(process.stdout.readline, "")
            address = next((line for line in lines if line.startswith(ADDRESS)), None)
            if address is None:
                log.seek(0)
                said = [line.strip() for line in log if line.strip()]
                reason = next((line for line in reversed(said) if "rror" in line), "no reason told")
                raise RunError(f"llama.cpp does not open the export ({reason[:300]})")
            yield _Server(address.removeprefix(ADDRESS).strip(), key)
        finally:
            process.stdin.close()
            process.stdout.close()
            try:
                process.wait(PATIENCE_SECONDS / 60)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
