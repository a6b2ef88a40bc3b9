"""Rows for question answering and for titles, out of the wheel of the package evals (MIT).

    pip download --no-deps evals==3.0.1.post1
    python examples/evals_rows.py evals-3.0.1.post1-py3-none-any.whl OUTPUT_FOLDER

stories-{train,test}.jsonl: short stories of who saw what being moved, with questions whose answer
is a word of the story (ToMi: Le et al., 2019), as SQuAD rows; all questions on a story are on one
side. titles-{train,test}.jsonl: abstracts of articles with their titles, as summaries.

Says how often the first and the last place of a story is the answer, whatever the question.
"""

from __future__ import annotations

import json
import re
import sys
import zipfile
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path

FOLDER = "evals/registry/data"
HELD_OUT = 0.2
MOST_HELD_OUT = 300


def samples(wheel: zipfile.ZipFile, name: str) -> Iterator[tuple[str, str]]:
    """(what a person says, what should be answered) of each row."""
    for line in wheel.read(
        f"{FOLDER}/{name}/{'test' if 'tomi' in name else 'samples'}.jsonl"
    ).splitlines():
        row = json.loads(line)
        yield row["input"][-1]["content"].strip(), row["ideal"]


def story(said: str, answer: str) -> tuple[str, dict] | None:
    """The story, and its row; None where the answer is not in it."""
    context, _, question = said.rpartition("Where")
    place = context.rfind(answer)  # where it was said last
    if place < 0:
        return None
    answers = {"text": [answer], "answer_start": [place]}
    return context, {"question": f"Where{question}", "context": context.strip(), "answers": answers}


def place_is_right(row: dict, which: int) -> bool:
    """Whether the first (0) or last (-1) place that something is in or moved to is the answer."""
    places = re.findall(r"(?:is in the|to the) (\w+)", row["context"])
    return bool(places) and places[which] == row["answers"]["text"][0]


def title(said: str, answer: str) -> tuple[str, dict]:
    return said, {"document": said, "summary": answer}


def main() -> None:
    wheel, output = zipfile.ZipFile(sys.argv[1]), Path(sys.argv[2])
    output.mkdir(parents=True, exist_ok=True)
    for name, folder, made in (
        ("stories", "theory_of_mind/tomi", story),
        ("titles", "abstract2title", title),
    ):
        sides: dict[str, list[str]] = {"train": [], "test": []}
        for row in filter(None, (made(*sample) for sample in samples(wheel, folder))):
            share = int(sha256(row[0].encode()).hexdigest()[:8], 16) / 2**32
            sides["test" if share < HELD_OUT else "train"].append(json.dumps(row[1]))
        del sides["test"][MOST_HELD_OUT:]
        for side, lines in sides.items():
            (output / f"{name}-{side}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
            print(f"{name}-{side}: {len(lines)} rows")
        if name == "stories":
            rows = [json.loads(line) for line in sides["test"]]
            for word, which in (("first", 0), ("last", -1)):
                right = sum(place_is_right(row, which) for row in rows) / max(1, len(rows))
                print(f"the {word} place is right for {right:.1%} of the test's rows")


if __name__ == "__main__":
    main()
