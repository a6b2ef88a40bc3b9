"""The rows that every contender learns from: real chats of mixed length, the same for all.

Two sources, both out of PyPI wheels, nothing invented:

- zaragoza-construction-faq 1.2.1 (Zaragoza AB, CC BY 4.0, DOI 10.5281/zenodo.19630803): 503
  English questions and answers on building law. A chat asks one to nine questions of one topic,
  so lengths spread as those of real chats do.
- the demo's smart-home requests (`llamaweft.data.smart_home`, Apache-2.0): short ones.

The rows depend on nothing but the seed.
"""

from __future__ import annotations

import json
import random
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llamaweft.data import smart_home
from llamaweft.data.chat import Document, Encoder
from llamaweft.data.formats import to_examples
from llamaweft.data.sources import read_path
from llamaweft.errors import UserError

FAQ_CHATS, SHORT_CHATS = 300, 100
MOST_QUESTIONS = 9
IGNORED_LABEL = -100

Chat = dict[str, Any]


def write_chats(path: Path, seed: int = 0) -> Path:
    """Write the chats as JSONL, `{"messages": [...]}` a line, and return `path`.

    Raises UserError when zaragoza-construction-faq is not installed.
    """
    draw = random.Random(seed)
    faq = _faq_chats(draw)
    chats = [next(faq) for _ in range(FAQ_CHATS)]
    chats += draw.sample(smart_home.rows("train"), SHORT_CHATS)
    draw.shuffle(chats)
    return _write_lines(path, chats)


def write_prefixed_chats(path: Path, tokenizer: Any, system_tokens: int, seed: int = 0) -> Path:
    """Write chats that share one system message, of about `system_tokens` tokens, each with one
    question and its answer of about 100 tokens (60 to 140) of their own."""
    draw = random.Random(seed)
    rows = [{"q": r["q"], "a": r["a"]} for r in _faq_rows()]
    draw.shuffle(rows)
    known = tokenizer(" ".join(row["a"] for row in rows[:40]), add_special_tokens=False)
    system = tokenizer.decode(known["input_ids"][:system_tokens])
    opening = {"role": "system", "content": system}
    chats = []
    for row in rows[40:]:
        chat = _chat([(row["q"], row["a"])])
        if 60 <= len(tokenizer(row["q"] + row["a"])["input_ids"]) <= 140:
            chats.append({"messages": [opening, *chat["messages"]]})
    return _write_lines(path, chats)


def _faq_chats(draw: random.Random) -> Iterator[Chat]:
    """Chats without end: each pass over the topics asks every question once, in a new order."""
    topics: dict[str, list[tuple[str, str]]] = defaultdict(list)
    for row in _faq_rows():
        topics[row["category"]].append((row["q"], row["a"]))
    while True:
        for pairs in draw.sample(sorted(topics.values()), len(topics)):
            left = draw.sample(pairs, len(pairs))
            while left:
                count = draw.randint(1, MOST_QUESTIONS)
                yield _chat(left[:count])
                left = left[count:]


def _faq_rows() -> list[dict[str, str]]:
    """Raises UserError when zaragoza-construction-faq is not installed."""
    try:
        from zaragoza_construction_faq import load
    except ImportError:
        raise UserError(
            "zaragoza-construction-faq is not installed; run `pip install -e '.[bench]'`, "
            "or give a file of chats with --data"
        ) from None
    return list(load(lang="en"))


def _chat(pairs: list[tuple[str, str]]) -> Chat:
    messages = []
    for question, answer in pairs:
        messages += [
            {"role": "user", "content": question},
            {"role": "assistant", "content": answer},
        ]
    return {"messages": messages}


def write_pieces(chats: Path, tokenizer: Any, longest: int, folder: Path) -> tuple[Path, Path]:
    """What the contenders read, made of the chats of at most `longest` tokens.

    Returns the chats as they are (JSONL, for llamaweft) and the same tokenised (JSONL of
    `input_ids` and `labels`, for trl): so that both train the same tokens of the same rows, and
    no pack cuts a chat. Raises UserError when no chat is that short.
    """
    rows = list(read_path(str(chats)))
    documents = Encoder(tokenizer)(list(to_examples(rows, "chat")))
    kept, tokenised = [], []
    for row, document in zip(rows, documents, strict=True):
        if len(document.ids) <= longest and document.trained_tokens:
            kept.append(row.content)
            tokenised.append(_labelled(document))
    if not kept:
        raise UserError(f"{chats}: no chat has at most {longest} tokens; give a longer pack")
    return (
        _write_lines(folder / f"chats-{longest}.jsonl", kept),
        _write_lines(folder / f"tokens-{longest}.jsonl", tokenised),
    )


def _labelled(document: Document) -> dict[str, list[int]]:
    ids = document.ids.tolist()
    trained = document.weights.tolist()
    labels = [i if weight else IGNORED_LABEL for i, weight in zip(ids, trained, strict=True)]
    return {"input_ids": ids, "labels": labels}


def describe(tokens: Path) -> dict[str, float]:
    """Rows, tokens, the share that is trained, and the spread of the lengths."""
    lengths, trained = [], 0
    for line in tokens.read_text(encoding="utf-8").splitlines():
        labels = json.loads(line)["labels"]
        lengths.append(len(labels))
        trained += sum(label != IGNORED_LABEL for label in labels)
    lengths.sort()
    return {
        "rows": len(lengths),
        "tokens": sum(lengths),
        "trained_share": trained / sum(lengths),
        "shortest_tokens": lengths[0],
        "median_tokens": lengths[len(lengths) // 2],
        "mean_tokens": sum(lengths) / len(lengths),
        "longest_tokens": lengths[-1],
    }


def _write_lines(path: Path, rows: list[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    path.write_bytes("".join(lines).encode())
    return path
