"""Why a model of the hub cannot be had: one sentence for each reason, and no secret in any."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager

from huggingface_hub import constants
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from llamaweft.errors import RunError, UserError
from llamaweft.model.builtin import BUILTIN
from llamaweft.shown import redacted

PAGE = "https://huggingface.co"
LOG_IN = "log in with `hf auth login` or set HF_TOKEN"
SHOWN = 200
"""Characters of a reason."""


@contextmanager
def explained(name: str, revision: str | None) -> Iterator[None]:
    """One sentence for each way in which a model of the hub cannot be had."""
    try:
        yield
    except (UserError, RunError):
        raise
    except Exception as error:  # the client raises many kinds
        raise UserError(_sentence(name, revision, error)) from None


def _sentence(name: str, revision: str | None, error: Exception) -> str:
    if isinstance(error, GatedRepoError):
        return (
            f"the model {name} is gated, and this account may not read it; accept its licence at "
            f"{PAGE}/{name}, then {LOG_IN}"
        )
    if isinstance(error, RevisionNotFoundError):
        return (
            f"model_revision: {revision} is no commit, tag or branch of {name}; see "
            f"{PAGE}/{name}/commits"
        )
    if isinstance(error, RepositoryNotFoundError):
        return (
            f"the model {name} is no folder here, and the hub has none of that name that this "
            f"account may see; check the name, and for a private model {LOG_IN}"
        )
    if isinstance(error, HFValidationError):
        return f"the model {name} is no folder here and no hub id (OWNER/NAME); check the recipe"
    if isinstance(error, HfHubHTTPError) and error.response.status_code in (401, 403):
        return (
            f"the hub refuses this account the model {name} ({reason_of(error)}); {LOG_IN}, with a "
            f"token that may read {PAGE}/{name}"
        )
    if is_full(error):
        return f"the disk of {constants.HF_HUB_CACHE} is full; free some, or set HF_HUB_CACHE"
    instead = f"give a folder, a .gguf file or {', '.join(BUILTIN)}"
    if isinstance(error, OfflineModeIsEnabled):
        return (
            f"the model {name} is no folder here and not, or not whole, in the hub's cache, and "
            f"HF_HUB_OFFLINE forbids to fetch it; unset that, or {instead}"
        )
    return (
        f"the model {name} is no folder here and cannot be fetched from the hub "
        f"({reason_of(error)}); check the connection, or {instead}"
    )


def is_refusal(error: Exception) -> bool:
    """Whether the hub said no, which asking again does not change."""
    return isinstance(error, HfHubHTTPError) and error.response.status_code in (401, 403, 404)


def is_full(error: Exception) -> bool:
    """Whether the disk has no room left."""
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)


def reason_of(error: Exception) -> str:
    """What went wrong, in few words. Never what a server says, nor an address with what may be
    secret in it: either can hold a token."""
    if isinstance(error, HfHubHTTPError):
        return f"the server answers {error.response.status_code}"
    said = (str(error).strip().splitlines() or [""])[0]
    if not said or "://" in said:
        return type(error).__name__
    return redacted(said)[:SHOWN]
