"""Fine-tune the embedded model on a few chats, as a library, and ask it something.

python examples/fine_tune.py runs/example
"""

import json
import sys
from pathlib import Path

from llamaweft.data.chat import stop_ids
from llamaweft.generate.chat import Chat
from llamaweft.generate.sampling import Sampling
from llamaweft.pipeline import Pipeline
from llamaweft.recipe import Recipe
from llamaweft.subject import open_subject

CHATS = [
    ("What is the opening time?", "We open at nine."),
    ("When do you open?", "We open at nine."),
    ("What is the closing time?", "We close at six."),
    ("When do you close?", "We close at six."),
    ("Are you open on Sundays?", "No, we rest on Sundays."),
    ("Do you open on Sunday?", "No, we rest on Sundays."),
]


def main(output: Path, model: str = "builtin:smollm2-135m", steps: int = 20) -> str:
    """Train in `output` and return the answer to one question."""
    output.mkdir(parents=True, exist_ok=True)
    data = output / "chats.jsonl"
    rows = [{"prompt": question, "completion": answer} for question, answer in CHATS]
    data.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")

    recipe = Recipe.validate_tree(
        {
            "model": model,
            "data": {"train": str(data), "validation": None},
            "adapter": {"r": 8, "lora_alpha": 16},
            "training": {
                "learning_rate": 2e-3,
                "max_steps": steps,
                "micro_batch_tokens": 256,
                "gradient_accumulation_steps": 1,
            },
            "output_dir": str(output / "run"),
        }
    )
    Pipeline(recipe).train()

    tuned = open_subject(str(output / "run"))
    tokenizer = tuned.pipeline.tokenizer
    chat = Chat(
        tuned.model,
        tokenizer,
        stop_ids=stop_ids(tokenizer),
        system=None,
        max_new_tokens=32,
        sampling=Sampling(),
    )
    return "".join(chat.ask("When do you open?"))


if __name__ == "__main__":
    print(main(Path(sys.argv[1])))
