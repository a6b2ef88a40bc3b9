"""What rendering chat templates in a process of their own costs: against transformers, in this one.

    python -m benchmarks.bench_templates

Chats of six messages of 30 words, 2,048 at once, as rows are prepared. The best of five rounds,
in turn.
"""

from __future__ import annotations

import time

from transformers.utils.chat_template_utils import render_jinja_template

from llamaweft.model.tokenizer import chat_template
from llamaweft.templates.render import renderer

CHATS, MESSAGES, WORDS, ROUNDS = 2048, 6, 30, 5
VARIABLES = {"bos_token": "<s>", "eos_token": "</s>"}


def chats() -> list[list[dict[str, str]]]:
    words = ["the", "quick", "brown", "fox", "jumps", "over", "the", "lazy", "dog"]
    return [
        [
            {
                "role": ("user", "assistant")[turn % 2],
                "content": " ".join(words[(turn + n + word) % 9] for word in range(WORDS)),
            }
            for turn in range(MESSAGES)
        ]
        for n in range(CHATS)
    ]


def main() -> None:
    made = chats()
    print(f"{'template':<10}{'own process, us a chat':>24}{'transformers here':>20}")
    for name in ("chatml", "llama3", "llama3.1"):
        template = chat_template(name)
        apart, here = [], []
        for _ in range(ROUNDS):
            began = time.perf_counter()
            ours = renderer().render(template, made, variables=VARIABLES)
            between = time.perf_counter()
            theirs, _ = render_jinja_template(
                conversations=made, chat_template=template, **VARIABLES
            )
            apart.append(between - began)
            here.append(time.perf_counter() - between)
            assert [one.text for one in ours] == theirs
        a, b = (min(seconds) / CHATS * 1e6 for seconds in (apart, here))
        print(f"{name:<10}{a:>24.0f}{b:>20.0f}")


if __name__ == "__main__":
    main()
