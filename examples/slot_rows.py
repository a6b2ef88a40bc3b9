"""Tagged words: the slots of the demo's smart-home sentences.

    python examples/slot_rows.py OUTPUT_FOLDER

Writes train.jsonl and test.jsonl, rows of {"tokens", "tags"}: B-area, I-area and so on where the
sentence names a slot's value, O elsewhere. The test's sentences are of templates that are not in
training.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from llamaweft.data.smart_home import rows


def tagged(sentence: str, slots: dict[str, object]) -> dict[str, list[str]]:
    """The words of a sentence, and the slot that each belongs to."""
    words = sentence.split()
    plain = [word.lower().strip(".,!?%") for word in words]
    tags = ["O"] * len(words)
    for slot, value in slots.items():
        said = str(value).lower().split()
        for start in range(len(words) - len(said) + 1):
            stop = start + len(said)
            if plain[start:stop] == said and set(tags[start:stop]) == {"O"}:
                tags[start:stop] = [f"B-{slot}"] + [f"I-{slot}"] * (len(said) - 1)
                break
    return {"tokens": words, "tags": tags}


def main() -> None:
    output = Path(sys.argv[1])
    output.mkdir(parents=True, exist_ok=True)
    for name, split in (("train", "train"), ("test", "validation")):
        made = []
        for row in rows(split):
            answer = json.loads(row["messages"][-1]["content"])
            made.append(tagged(row["messages"][-2]["content"], answer.get("slots", {})))
        lines = "\n".join(json.dumps(row) for row in made) + "\n"
        (output / f"{name}.jsonl").write_text(lines, encoding="utf-8")
        print(f"{name}: {len(made)} rows")


if __name__ == "__main__":
    main()
