"""What may be shown or kept: text without secrets and without what acts on a terminal.

A secret has no place in a recipe. An address names an environment variable instead, as in
`https://host/rows.jsonl?${DATA_QUERY}`, which is filled in when the address is read (`filled`).
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path

from llamaweft.errors import UserError

HIDDEN = "***"
LEAST_CHARACTERS = 8
"""A shorter value of a variable with a telling name is rather a switch than a secret."""

_TELLING = (
    r"token|secret|signature|passw(?:or)?d|passwd|credential|api[-_]?key|access[-_]?key|"
    r"private[-_]?key|authorization"
)
_VARIABLE = re.compile(_TELLING, re.IGNORECASE)
_NO_SECRET = re.compile(r"_(?:FILE|PATH|DIR|SOCK)$", re.IGNORECASE)
_PLACEHOLDER = re.compile(r"\$\{([A-Za-z_][A-Za-z0-9_]*)\}")
_LOGIN = re.compile(r"\b([A-Za-z][A-Za-z0-9+.-]*://)([^/?#\s@:]*):([^/?#\s@]*)@")
_PARAMETER = re.compile(
    rf"([?&;])([^=&;#\s?]*(?:{_TELLING})[^=&;#\s]*|sig|key|pwd|pass|sas|jwt|auth)=([^&;#\s'\"]*)",
    re.IGNORECASE,
)
_KNOWN_FORMS = re.compile(
    r"\b(?:hf_[A-Za-z0-9]{16,}|sk-[A-Za-z0-9_-]{16,}|gh[pousr]_[A-Za-z0-9]{20,}"
    r"|A(?:KI|SI)A[A-Z0-9]{16}|xox[a-z]-[A-Za-z0-9-]{10,}"
    r"|eyJ[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]+)"
    r"|(?<=Bearer )\S{8,}"
)

_INVISIBLE = {code: 0x2400 + code for code in range(32) if code not in (9, 10)}
_INVISIBLE |= dict.fromkeys([*range(0x80, 0xA0), *range(0x202A, 0x202F), *range(0x2066, 0x206A)])
_CONTROL = {code: chr(to) if to else "\ufffd" for code, to in _INVISIBLE.items()} | {127: "\u2421"}


def printable(text: str) -> str:
    """`text` without characters that move a cursor, colour a terminal, set its title or turn the
    order of what follows: each is written as a picture of itself or as U+FFFD. Line ends and tabs
    stay."""
    return text.translate(_CONTROL)


def redacted(text: str, secrets: Collection[str] = ()) -> str:
    """`text` with HIDDEN in place of each secret: logins and signatures in addresses, tokens of
    known form, values of environment variables with a telling name, the hub's stored token, and
    those given."""
    known = {value for value in (*secrets, *_secrets_here()) if len(value) >= LEAST_CHARACTERS}
    for value in sorted(known, key=len, reverse=True):
        text = text.replace(value, HIDDEN)
    text = _LOGIN.sub(rf"\g<1>{HIDDEN}@", text)
    text = _PARAMETER.sub(rf"\g<1>\g<2>={HIDDEN}", text)
    return _KNOWN_FORMS.sub(HIDDEN, text)


def _secrets_here() -> list[str]:
    """Those of the environment, and the token that `hf auth login` stores."""
    found = [
        value
        for name, value in os.environ.items()
        if _VARIABLE.search(name) and not _NO_SECRET.search(name)
    ]
    home = os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface"
    stored = Path(os.environ.get("HF_TOKEN_PATH") or Path(home) / "token")
    with suppress(OSError, ValueError):
        found.append(stored.read_text(encoding="utf-8").strip())
    return found


def secret_in(address: str) -> str | None:
    """What secret an address holds: a password, or a parameter by its name. None for none, and
    where an environment variable stands in its place."""
    login = _LOGIN.search(address)
    if login and not _PLACEHOLDER.fullmatch(login[3]):
        return "a password"
    for _, name, value in _PARAMETER.findall(address):
        if value and not _PLACEHOLDER.fullmatch(value):
            return name
    return None


def without_secret(address: str) -> str:
    """The address itself. Raises ValueError, without naming it, where it holds a secret."""
    if (secret := secret_in(address)) is not None:
        raise ValueError(
            f"the address {redacted(address)} holds {secret}, and would be written down with it; "
            "put that into an environment variable and name it in its place, as ${MY_SECRET}"
        )
    return address


def filled(address: str) -> tuple[str, list[str]]:
    """The address with the values of the environment variables that it names, and these values,
    which are secret. Raises UserError where one is not set."""
    values: list[str] = []

    def value_of(found: re.Match[str]) -> str:
        value = os.environ.get(found[1])
        if not value:
            raise UserError(
                f"{address} names the environment variable {found[1]}, and it is not set"
            )
        values.append(value)
        return value

    return _PLACEHOLDER.sub(value_of, address), values
