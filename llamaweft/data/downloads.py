"""Copies of what addresses name, in the cache: so that it can be read again, and offline.

Secrets come from the environment variables that an address names, or, for the web, from ~/.netrc.
Names, keys of the cache and sentences are made of the address as it was given, without them.
"""

from __future__ import annotations

import base64
import json
import netrc
import os
import re
import shutil
from contextlib import suppress
from http.client import HTTPException
from pathlib import Path
from typing import Any, BinaryIO
from urllib.error import HTTPError
from urllib.parse import unquote, urlsplit
from urllib.request import Request, urlopen

import xxhash

from llamaweft.data.content import (
    BLOCK_BYTES,
    File,
    endings_of,
    is_readable,
    known_endings,
    need_ending,
)
from llamaweft.errors import UserError
from llamaweft.files import need_disk, write_text
from llamaweft.shown import filled, redacted

TIMEOUT_SECONDS = 60

_MAGIC = re.compile(r"[*?\[]")


def web_file(address: str) -> File:
    """Downloaded, unless the copy in the cache is current or nobody answers."""
    name = address.partition("?")[0].partition("#")[0]
    file_name = unquote(urlsplit(address).path).rpartition("/")[2]
    need_ending(name, file_name)
    place = _copy_of(address, file_name)
    asked, secrets = filled(address)
    try:
        request = _request(asked, _mark(place))
        with urlopen(request, timeout=TIMEOUT_SECONDS) as answer:
            marks = {"If-None-Match": "ETag", "If-Modified-Since": "Last-Modified"}
            mark = {ours: answer.headers[its] for ours, its in marks.items() if answer.headers[its]}
            length = answer.headers["Content-Length"]
            _store(name, place, answer, mark, int(length) if length else None)
    except HTTPError as error:
        if error.code != 304:
            raise UserError(
                f"{name} cannot be downloaded: the server answers {error.code} "
                f"{redacted(str(error.reason), secrets)}; check the address, and the login where "
                "it needs one (environment variables in the address, or ~/.netrc)"
            ) from None
    except (OSError, HTTPException, ValueError) as error:
        if not place.is_file():
            reason = redacted(str(getattr(error, "reason", error)), secrets)
            reason = reason or type(error).__name__
            raise UserError(
                f"{name} cannot be downloaded: {reason}; check the address and the connection"
            ) from None
    return File(name, place)


def _request(address: str, mark: dict[str, str]) -> Request:
    """With the login of the address, else that of ~/.netrc, for this host alone: no server that it
    leads on to is told."""
    parts = urlsplit(address)
    login = parts.netloc.rpartition("@")[0]
    plain = parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()
    request = Request(plain, headers={"User-Agent": "llamaweft", **mark})
    login = unquote(login) if login else _netrc_login(parts.hostname or "")
    if login:
        encoded = base64.b64encode(login.encode()).decode()
        request.add_unredirected_header("Authorization", f"Basic {encoded}")
    return request


def _netrc_login(host: str) -> str:
    try:
        found = netrc.netrc(os.environ.get("NETRC")).hosts.get(host)
    except OSError:
        return ""
    except netrc.NetrcParseError as error:  # its text may quote a password
        raise UserError(f"{error.filename} line {error.lineno} cannot be read; mend it") from None
    return f"{found[0]}:{found[2]}" if found else ""


def remote_files(address: str) -> list[File]:
    """The files of an address that fsspec knows: a file, a folder or a glob."""
    import fsspec

    asked, secrets = filled(address)
    try:
        system, path = fsspec.core.url_to_fs(asked)
        if _MAGIC.search(path):
            listed = system.glob(path, detail=True)
        else:
            listed = {path: system.info(path)}
            if listed[path]["type"] == "directory":
                listed = system.find(path, detail=True)
            else:
                need_ending(redacted(address), path)
        found = sorted(p for p, info in listed.items() if info["type"] == "file" and is_readable(p))
        if not found:
            raise UserError(f"{address} names no file that ends in {known_endings()}; check it")
        return [_remote_file(system, path) for path in found]
    except UserError:
        raise
    except ImportError as error:
        reason = redacted(str(error), secrets)
        raise UserError(f"{address} needs a package that is not installed: {reason}") from None
    except FileNotFoundError:
        raise UserError(f"there is no file {address}; check the path in the recipe") from None
    except Exception as error:  # each driver raises its own kinds
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"{address} cannot be read: {redacted(reason, secrets)}") from None


def _remote_file(system: Any, path: str) -> File:
    name = system.unstrip_protocol(path)
    place = _copy_of(name, path)
    mark = {"ukey": str(system.ukey(path))}
    if _mark(place) != mark:
        with system.open(path, "rb") as content:
            _store(name, place, content, mark, system.info(path).get("size"))
    return File(name, place)


def _copy_of(address: str, file_name: str) -> Path:
    """Where in the cache the copy of an address is."""
    from llamaweft.runtime import cache_dir  # imports torch, which no other file needs

    key = xxhash.xxh3_128_hexdigest(address.encode())
    return cache_dir() / "downloads" / f"{key}{''.join(endings_of(file_name))}"


def _mark(place: Path) -> dict[str, str]:
    """What tells whether a copy is current, as it was stored beside it; empty without a copy."""
    with suppress(OSError, ValueError):
        if place.is_file():
            return dict(json.loads(place.with_suffix(".mark").read_text(encoding="utf-8")))
    return {}


def _store(
    name: str, place: Path, content: BinaryIO | Any, mark: dict[str, str], length: int | None
) -> None:
    """Copy aside, then rename. Raises UserError when less than `length` comes or the disk is
    full."""
    need_disk(place.parent, length or 0, f"the copy of {name}")
    aside = place.with_name(f".{place.name}.{os.getpid()}")
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        with aside.open("wb") as file:
            shutil.copyfileobj(content, file, BLOCK_BYTES)
            size = file.tell()
            file.flush()
            os.fsync(file.fileno())
        if length is not None and size != length:
            raise UserError(f"{name} was cut short on its way ({size} of {length} bytes); try anew")
        aside.replace(place)
        write_text(place.with_suffix(".mark"), json.dumps(mark))
    except (OSError, HTTPException) as error:
        raise UserError(f"{name} cannot be copied to {place}: {error}") from None
    finally:
        aside.unlink(missing_ok=True)
