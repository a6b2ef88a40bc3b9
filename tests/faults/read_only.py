"""Trains with a run folder, and with a cache, that lie on a read-only disk; prints the exit codes.

unshare -rm python tests/faults/read_only.py MODEL FOLDER     (Linux; mounts tmpfs)
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from full_disk import mount, run
from kills import write_files


def main() -> None:
    model, folder = map(Path, sys.argv[1:])
    recipe = write_files(folder, model, max_steps=1)
    disk = folder / "disk"
    mount(disk, "size=8m")
    subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
    output, output_said = run(recipe, disk / "run", folder / "cache")
    cache, cache_said = run(recipe, folder / "run", disk / "cache")
    said = [output_said, cache_said]
    errors = [line for text in said for line in text.splitlines() if line.startswith("error: ")]
    print(
        json.dumps(
            {
                "output_dir": output,
                "cache": cache,
                "sentences": len(errors),
                "output_said": "Read-only" in output_said and "Traceback" not in output_said,
                "cache_said": "Read-only" in cache_said and "Traceback" not in cache_said,
            }
        )
    )


if __name__ == "__main__":
    main()
