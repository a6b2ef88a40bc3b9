"""A model of the hub: what is needed of it, fetched into huggingface_hub's own cache.

huggingface_hub keeps files that have arrived whole and, as of 2.4, throws half a file away. So
large files are fetched here, with its own request, to where the cache keeps them (`blobs/`, each
under its SHA-256: https://huggingface.co/docs/huggingface_hub/guides/manage-cache), where half a
file waits as `SHA.incomplete`; its client then finds them there. Nothing that is fetched is run,
and only files at the top of the repository are.
"""

from __future__ import annotations

import fnmatch
import glob
import hashlib
import os
import re
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath, PureWindowsPath

from huggingface_hub import HfApi, constants, hf_hub_url, snapshot_download
from huggingface_hub.errors import (
    HFValidationError,
    LocalEntryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.file_download import http_get, repo_folder_name
from huggingface_hub.utils import WeakFileLock, build_hf_headers

from llamaweft.errors import RunError, UserError
from llamaweft.files import need_disk
from llamaweft.model.hub_errors import explained, is_full, is_refusal, reason_of
from llamaweft.runtime import cache_dir

DESCRIPTION = ["*.json", "*.jinja", "tokenizer.model", "merges.txt", "vocab.txt"]
"""Config, tokenizer and templates."""
SAFETENSORS, PICKLES = "model*.safetensors", "pytorch_model*.bin"
"""Weights; the second only where there are none of the first."""

TIMEOUT_SECONDS = 30
HEX_40, HEX_64 = re.compile(r"[0-9a-f]{40}"), re.compile(r"[0-9a-f]{64}")


def downloaded(name: str, revision: str | None = None, store_codec: str | None = None) -> Path:
    """The snapshot of a model of the hub, complete, named after its commit.

    revision: commit, tag or branch; None: the main branch. store_codec: what the weights will be
    held in; there must be room for that too. Without a connection, or where the hub says no, what
    is in the cache is taken. A download that was cut goes on.

    Raises UserError when there is no such model or revision, no access, no connection or too
    little room, RunError when the connection is cut in the midst.
    """
    with explained(name, revision):
        try:
            found = _listed(name, revision)
        except Exception as error:
            return _from_cache(name, revision, error)
        weights = _weights(name, found)
        described = [file for file in found.files if _matches(file, DESCRIPTION)]
        folder = _snapshot(name, revision, described, found.commit)
        wanted = [file for file in weights if not (folder / file).exists()]
        if wanted:
            _fetch_weights(name, found, wanted, folder, store_codec)
        return _snapshot(name, revision, [*described, *weights], found.commit)


def downloaded_tokenizer(name: str) -> Path:
    """A folder with the tokenizer of a model of the hub, and without its weights.

    Raises UserError as `downloaded`.
    """
    with explained(name, None):
        try:
            found = _listed(name, None)
        except Exception as error:
            return _from_cache(name, None, error, weights=False)
        described = [file for file in found.files if _matches(file, DESCRIPTION)]
        return _snapshot(name, None, described, found.commit)


# --- what there is --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Listed:
    """What the hub says of a model: a commit, the bytes of each file at the top of it, and the
    SHA-256 of those that it keeps as large files."""

    commit: str
    files: dict[str, int] = field(default_factory=dict)
    digests: dict[str, str] = field(default_factory=dict)


def _listed(name: str, revision: str | None) -> Listed:
    """Raises UserError for names that would leave the folder, and what the hub's client raises."""
    api = HfApi()
    info = api.model_info(name, revision=revision, files_metadata=True, timeout=TIMEOUT_SECONDS)
    found = Listed(str(info.sha))
    if not HEX_40.fullmatch(found.commit):
        raise UserError(f"the hub names no commit of {name}; check HF_ENDPOINT")
    for file in info.siblings or []:
        path = file.rfilename
        for kind in (PurePosixPath, PureWindowsPath):
            if kind(path).is_absolute() or kind(path).drive or ".." in kind(path).parts:
                raise UserError(
                    f"the model {name} names a file outside its folder, {path[:80]!r}, so nothing "
                    "of it is fetched; take another model"
                )
        if "/" in path or "\\" in path:
            continue
        found.files[path] = file.size or 0
        digest = getattr(file.lfs, "sha256", None)
        if digest is not None:
            if not HEX_64.fullmatch(digest):
                raise UserError(f"the hub has no digest of {path} of {name}; check HF_ENDPOINT")
            found.digests[path] = digest
    return found


def _matches(file: str, patterns: list[str]) -> bool:
    return any(fnmatch.fnmatchcase(file, pattern) for pattern in patterns)


def _weights(name: str, found: Listed) -> list[str]:
    """The files of weights. Raises UserError for what is no model of transformers."""
    if "config.json" not in found.files:
        gguf = any(file.endswith(".gguf") for file in found.files)
        raise UserError(
            f"{name} on the hub holds no config.json, so it is no model that can be trained; "
            + ("fetch one of its .gguf files and give that" if gguf else "give another")
        )
    for pattern in (SAFETENSORS, PICKLES):
        if files := [file for file in found.files if _matches(file, [pattern])]:
            return files
    raise UserError(
        f"{name} on the hub holds no {SAFETENSORS} and no {PICKLES}; give a model with weights"
    )


# --- what is fetched ------------------------------------------------------------------------------


def _snapshot(name: str, revision: str | None, files: list[str], commit: str) -> Path:
    """The folder with these files, fetched by the hub's client where they are not there yet."""
    exactly = [glob.escape(file) for file in files]
    folder = Path(snapshot_download(name, revision=revision, allow_patterns=exactly))
    if folder.name != commit:
        raise RunError(f"the model {name} has changed while it was fetched; run the command again")
    return folder


def _fetch_weights(
    name: str, found: Listed, wanted: list[str], folder: Path, store_codec: str | None
) -> None:
    blobs = _storage(name) / "blobs"
    missing = [
        file for file in wanted if not (blobs / found.digests.get(file, "in no blob")).exists()
    ]
    parts = {
        file: blobs / f"{found.digests[file]}.incomplete"
        for file in missing
        # Beyond what its servers send in one answer, the hub's client has a way of its own.
        if file in found.digests and found.files[file] <= constants.MAX_HTTP_DOWNLOAD_SIZE
    }
    have = sum(part.stat().st_size for part in parts.values() if part.exists())
    _need_room(name, sum(found.files[file] for file in missing) - have, folder, store_codec)
    for file, part in parts.items():
        _fetch(name, found, file, part)


def _need_room(name: str, fetched: int, folder: Path, store_codec: str | None) -> None:
    """Raises UserError where the disk has no room for the download and the store made of it."""
    from llamaweft.model.folder import read_config
    from llamaweft.model.stores import store_bytes

    store = 0 if store_codec is None else store_bytes(read_config(folder), store_codec)
    cache, ours = Path(constants.HF_HUB_CACHE), cache_dir()
    if _disk(cache) == _disk(ours):
        what = f"the model {name}" + (f" and its {store_codec} store" if store else "")
        need_disk(cache, fetched + store, what)
        return
    need_disk(cache, fetched, f"the model {name}")
    need_disk(ours, store, f"the {store_codec} store of {name}")


def _disk(folder: Path) -> int:
    return next(p for p in [folder, *folder.absolute().parents] if p.exists()).stat().st_dev


def _storage(name: str) -> Path:
    return Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=name, repo_type="model")


def _fetch(name: str, found: Listed, file: str, part: Path) -> None:
    """Fetch one file, or the rest of it. Raises RunError when it does not arrive or arrives
    damaged, and what the hub's client raises where it says no."""
    whole, size = part.with_suffix(""), found.files[file]
    locks = Path(constants.HF_HUB_CACHE) / ".locks" / _storage(name).name
    for parent in (part.parent, locks):
        parent.mkdir(parents=True, exist_ok=True)
    # The hub's own lock of this file: two processes never write one part.
    with WeakFileLock(locks / f"{whole.name}.lock"):
        if whole.exists():
            return
        if part.exists() and part.stat().st_size > size:
            part.unlink()
        try:
            _go_on(hf_hub_url(name, file, revision=found.commit), file, size, part)
        except Exception as error:
            if is_refusal(error) or is_full(error):
                raise
            raise RunError(
                f"{file} of {name} did not arrive ({reason_of(error)}); "
                f"{part.stat().st_size / 2**20:.0f} of {size / 2**20:.0f} MiB are kept, and the "
                "same command goes on from there"
            ) from None
        with part.open("rb") as content:
            digest = hashlib.file_digest(content, "sha256").hexdigest()
        if digest != whole.name:
            part.unlink()
            raise RunError(
                f"{file} of {name} arrived damaged (its SHA-256 is another) and was removed; run "
                "the command again"
            )
        part.replace(whole)


def _go_on(url: str, file: str, size: int, part: Path) -> None:
    with part.open("ab") as target:
        http_get(
            url,
            target,
            resume_size=target.tell(),
            headers=build_hf_headers() | {"Accept-Encoding": "identity"},
            expected_size=size,
            displayed_filename=file,
        )
        target.flush()
        os.fsync(target.fileno())


def _from_cache(name: str, revision: str | None, error: Exception, weights: bool = True) -> Path:
    """The snapshot that is there already. Raises `error`, or that the snapshot is cut short."""
    if isinstance(error, UserError | HFValidationError | RevisionNotFoundError):
        raise error
    patterns = [*DESCRIPTION, SAFETENSORS] if weights else DESCRIPTION
    try:
        return Path(
            snapshot_download(
                name,
                revision=revision,
                allow_patterns=patterns,
                ignore_patterns=["*/*"],
                local_files_only=True,
            )
        )
    except LocalEntryNotFoundError:
        raise error from None
