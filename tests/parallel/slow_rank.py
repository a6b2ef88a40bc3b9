"""Run as a rank that lags: `python slow_rank.py SECONDS ARGUMENTS` is `llamaweft ARGUMENTS` in which
every pack takes so many seconds more."""

from __future__ import annotations

import sys
import time
from typing import Any


def main(seconds: float) -> None:
    from llamaweft.cli.app import main as llamaweft
    from llamaweft.model.llama import LlamaForCausalLM

    real = LlamaForCausalLM.loss

    def slow(self: LlamaForCausalLM, pack: Any) -> Any:
        time.sleep(seconds)
        return real(self, pack)

    LlamaForCausalLM.loss = slow  # type: ignore[method-assign]
    llamaweft()


if __name__ == "__main__":
    main(float(sys.argv.pop(1)))
