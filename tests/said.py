"""A command run in this process, with all that it says."""

from __future__ import annotations

import sys

import pytest


def all_said(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: object
) -> tuple[int, str]:
    """The exit code of `llamaweft ARGUMENTS`, and stdout and stderr one after the other."""
    from llamaweft.cli.app import main

    monkeypatch.setattr(sys, "argv", ["llamaweft", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        main()
    said = capsys.readouterr()
    return int(ended.value.code or 0), said.out + said.err
