"""Sources: every place that rows come from, and every place that is refused."""

from __future__ import annotations

import gzip
import json
import os
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import datasets
import fsspec
import pytest

from llamaweft.data.sources import BadRows, PlainSource, fingerprint, read_path, read_rows
from llamaweft.errors import UserError


def line(number: int) -> str:
    return json.dumps({"a": number}) + "\n"


def numbers(path: str | list[str] | Path) -> list[int]:
    return [row.content["a"] for row in read_rows(PlainSource(path if isinstance(path, list) else str(path)))]  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Files that hold 1 to 4, and some that hold no rows."""
    root = tmp_path / "data"
    (root / "deep" / "deeper").mkdir(parents=True)
    (root / ".hidden").mkdir()
    (root / "empty").mkdir()
    (root / "b.jsonl").write_text(line(2))
    (root / "a.json").write_text("[" + line(1) + "]")
    (root / "deep" / "c.jsonl.gz").write_bytes(gzip.compress(line(3).encode()))
    (root / "deep" / "deeper" / "d.ndjson").write_text(line(4))
    for name in ("notes.pdf", ".draft.jsonl", "deep/rows.parquet.gz", ".hidden/x.jsonl"):
        (root / name).write_bytes(b"no rows")
    return root


def test_a_folder_is_read_through_in_order(folder: Path) -> None:
    assert numbers(folder) == [1, 2, 3, 4]
    assert [row.name for row in read_path(str(folder))] == [
        str(folder / name) for name in ("a.json", "b.jsonl", "deep/c.jsonl.gz", "deep/deeper/d.ndjson")
    ]  # fmt: skip


def test_the_files_of_a_folder_are_sorted_by_name(tmp_path: Path) -> None:
    for number in (5, 2, 8, 1, 9, 3, 7, 4, 6):
        (tmp_path / f"{number}.jsonl").write_text(line(number))
    assert numbers(tmp_path) == list(range(1, 10))


def test_a_folder_within_that_may_not_be_read_is_named(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    listed = os.scandir

    def scandir(path: str) -> Iterator[os.DirEntry]:
        if path.endswith("deep"):
            raise PermissionError(13, "Permission denied", path)
        return listed(path)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(UserError, match="data/deep cannot be read: Permission denied"):
        numbers(folder)


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("*.jsonl", [2]),
        ("*", [1, 2]),
        ("**", [1, 2, 3, 4]),
        ("**/*.nd*", [4]),
        ("*/*", [3]),
        ("d??p/**/*.*", [3, 4]),
        ("**/**/deeper/[cd].ndjson", [4]),
    ],
)
def test_a_glob(folder: Path, pattern: str, expected: list[int]) -> None:
    assert numbers(folder / pattern) == expected


def test_a_glob_below_the_current_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    assert [row.where for row in read_path("*.jsonl")] == ["b.jsonl line 1"]


def test_a_name_that_looks_like_a_glob_is_a_name_where_it_is_there(tmp_path: Path) -> None:
    (tmp_path / "a[1].jsonl").write_text(line(7))
    assert numbers(tmp_path / "a[1].jsonl") == [7]


def test_several_places_are_read_in_the_order_given(folder: Path) -> None:
    assert numbers([str(folder / "b.jsonl"), str(folder / "deep"), f"file://{folder}/a.json"]) == [2, 3, 4, 1]  # fmt: skip


@pytest.mark.parametrize(
    ("place", "words"),
    [
        ("data/gone.jsonl", ["there is no file", "gone.jsonl"]),
        ("data/notes.pdf", ["notes.pdf", "end in .jsonl"]),
        ("data/deep/rows.parquet.gz", ["end in .jsonl"]),
        ("data/*.pdf", ["*.pdf names no file that ends in .jsonl"]),
        ("data/empty", ["data/empty names no file that ends in .jsonl"]),
        ("gone/*.jsonl", ["there is no folder gone"]),
        ("", ["there is no file"]),
        ([], ["names no file"]),
        ("data/fifo.jsonl", ["fifo.jsonl is no ordinary file"]),
        ("data/b.jsonl/c.jsonl", ["there is no file"]),
        ("a\0.jsonl", ["there is no file"]),
        ("a" * 300 + ".jsonl", ["cannot be read", "name too long"]),
        ("/dev/zero", ["end in .jsonl"]),
        ("data/zero.jsonl", ["zero.jsonl is no ordinary file"]),
        ("xyz://host/a.jsonl", ["xyz://host/a.jsonl", "Protocol not known"]),
    ],
)
def test_a_place_that_is_refused(
    folder: Path, place: str, words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder.parent)
    os.mkfifo(folder / "fifo.jsonl")
    (folder / "zero.jsonl").symlink_to("/dev/zero")
    with pytest.raises(UserError) as caught:
        list(read_rows(PlainSource(place)))
    for word in words:
        assert word.lower() in str(caught.value).lower()


def test_a_fifo_in_a_folder_is_refused_before_it_is_opened(folder: Path) -> None:
    os.mkfifo(folder / "deep" / "fifo.csv")
    with pytest.raises(UserError, match=r"fifo\.csv is no ordinary file"):
        numbers(folder)


def test_a_link_out_of_a_folder_is_refused_and_one_given_by_name_is_not(
    folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "secret.jsonl").write_text(line(9))
    link = folder / "deep" / "link.jsonl"
    link.symlink_to(tmp_path / "secret.jsonl")
    for place in (folder, folder / "**/*.jsonl"):
        with pytest.raises(UserError, match=r"link\.jsonl leads out of its folder"):
            numbers(place)
    assert numbers(folder / "*.jsonl") == [2]
    assert numbers(link) == [9]


def test_a_link_to_a_folder_outside_is_refused(folder: Path, tmp_path: Path) -> None:
    (folder / "link").symlink_to(tmp_path)
    with pytest.raises(UserError, match="link leads out of its folder"):
        numbers(folder)
    assert numbers(folder / "*.jsonl") == [2]


def test_loops_of_links_end_and_no_row_is_read_twice(folder: Path) -> None:
    (folder / "deep" / "up").symlink_to(folder)
    (folder / "loop").symlink_to("loop")
    (folder / "latest.jsonl").symlink_to("b.jsonl")
    assert numbers(folder) == [1, 2, 3, 4]
    (folder / "self.jsonl").symlink_to("self.jsonl")
    with pytest.raises(UserError, match=r"self\.jsonl leads nowhere"):
        numbers(folder)


def test_a_folder_that_is_itself_a_link_is_read(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(folder)
    assert numbers(tmp_path / "link") == [1, 2, 3, 4]


def test_bad_rows_are_counted_over_all_files_and_nothing_left_is_an_error(folder: Path) -> None:
    (folder / "b.jsonl").write_text("{oops\n[]\n")
    (folder / "deep" / "deeper" / "d.ndjson").write_text("{oops\n" * 4)
    bad = BadRows("skip")
    assert [row.content["a"] for row in read_rows(PlainSource(str(folder)), bad)] == [1, 3]
    assert (bad.count, len(bad.examples)) == (6, 5)
    with pytest.raises(UserError, match=r"b\.jsonl holds no rows that can be read"):
        list(read_rows(PlainSource(str(folder / "b.jsonl")), BadRows("skip")))
    with pytest.raises(UserError, match=r"b\.jsonl line 1 is not valid JSON"):
        list(read_rows(PlainSource(str(folder))))


def test_a_fingerprint_is_of_names_and_bytes(folder: Path) -> None:
    first = fingerprint(PlainSource(str(folder)))
    assert fingerprint(PlainSource(str(folder))) == first
    (folder / "notes.pdf").write_bytes(b"other")
    assert fingerprint(PlainSource(str(folder))) == first
    (folder / "b.jsonl").write_text(line(5))
    second = fingerprint(PlainSource(str(folder)))
    (folder / "b.jsonl").rename(folder / "c.jsonl")
    third = fingerprint(PlainSource(str(folder)))
    assert len({first, second, third}) == 3


def test_the_smart_home_rows_are_a_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from llamaweft.data import smart_home

    (tmp_path / "train.jsonl").write_text(line(1))
    monkeypatch.setattr(smart_home, "path", lambda split: tmp_path / f"{split}.jsonl")
    assert read_path("builtin:smart-home/train")[0].where == "builtin:smart-home/train line 1"
    assert fingerprint(PlainSource("builtin:smart-home/train"))


class Web(BaseHTTPRequestHandler):
    """Serves `content` at any path but /gone.jsonl, and knows whether it is asked for again."""

    content = b""
    served = 0
    length: int | None = None

    def do_GET(self) -> None:
        tag = f'"{hash(self.content)}"'
        if "gone" in self.path:
            self.send_error(404, "Not Found")
        elif self.headers["If-None-Match"] == tag:
            self.send_response(304)
            self.end_headers()
        else:
            type(self).served += 1
            self.send_response(200)
            self.send_header("ETag", tag)
            self.send_header("Content-Length", str(self.length or len(self.content)))
            self.end_headers()
            self.wfile.write(self.content)

    def log_message(self, *args: object) -> None:
        return


@pytest.fixture
def web(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[type[Web], str]]:
    monkeypatch.setenv("LLAMAWEFT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("no_proxy", "*")
    handler = type("Served", (Web,), {"content": line(1).encode()})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield handler, f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        thread.join()


def test_a_web_address_is_fetched_once_while_it_stays_the_same(
    web: tuple[type[Web], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    handler, host = web
    monkeypatch.setenv("MY_QUERY", "token=secret")
    address = f"{host}/my/rows.jsonl?${{MY_QUERY}}"
    assert [row.where for row in read_path(address)] == [f"{host}/my/rows.jsonl line 1"]
    first = fingerprint(PlainSource(address))
    assert handler.served == 1
    handler.content = gzip.compress(line(2).encode())
    assert numbers(f"{host}/my/rows.jsonl.gz") == [2]
    handler.content = line(3).encode()
    assert numbers(address) == [3]
    assert fingerprint(PlainSource(address)) != first
    assert handler.served == 3
    assert "secret" not in "".join(
        f"{path} {path.read_bytes()!r}"
        for path in (tmp_path / "cache").rglob("*")
        if path.is_file()
    )


def test_a_copy_serves_while_nobody_answers(
    web: tuple[type[Web], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, host = web
    assert numbers(f"{host}/rows.jsonl") == [1]

    def offline(*args: object, **options: object) -> None:
        raise OSError("Network is unreachable")

    monkeypatch.setattr("llamaweft.data.downloads.urlopen", offline)
    assert numbers(f"{host}/rows.jsonl") == [1]
    with pytest.raises(UserError, match=r"other\.jsonl cannot be downloaded: Network is unreach"):
        numbers(f"{host}/other.jsonl")


def test_a_download_that_fails_leaves_nothing(web: tuple[type[Web], str], tmp_path: Path) -> None:
    handler, host = web
    with pytest.raises(UserError, match="the server answers 404 Not Found"):
        numbers(f"{host}/gone.jsonl")
    with pytest.raises(UserError, match=r"end in \.jsonl"):
        numbers(f"{host}/page.html")
    with pytest.raises(UserError, match="cannot be downloaded"):
        numbers("http:///a.jsonl")
    handler.length = 10_000
    with pytest.raises(UserError, match=r"rows\.jsonl was cut short on its way \(9 of 10000"):
        numbers(f"{host}/rows.jsonl")
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]


def test_a_folder_and_a_glob_of_another_file_system(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LLAMAWEFT_CACHE", str(tmp_path / "cache"))
    store = fsspec.filesystem("memory")
    store.pipe({f"/bucket/{n}.jsonl": line(n).encode() for n in (2, 1)} | {"/bucket/x.pdf": b"x"})
    try:
        assert numbers("memory://bucket") == [1, 2]
        assert numbers("memory://bucket/[2-9].jsonl") == [2]
        assert read_path("memory://bucket/1.jsonl")[0].where == "memory:///bucket/1.jsonl line 1"
        copies = [path.stat().st_ino for path in (tmp_path / "cache").rglob("*.jsonl")]
        assert numbers("memory://bucket") == [1, 2]
        assert [path.stat().st_ino for path in (tmp_path / "cache").rglob("*.jsonl")] == copies
        store.pipe("/bucket/1.jsonl", line(3).encode())
        assert numbers("memory://bucket/1.jsonl") == [3]
        for place in ("gone.jsonl", "x.pdf", "*.csv"):
            with pytest.raises(UserError, match=r"there is no file|end in|names no file"):
                numbers(f"memory://bucket/{place}")
    finally:
        store.rm("/bucket", recursive=True)


@pytest.mark.parametrize(
    "address", ["https://me:pw@host/a.jsonl", "s3://K:S@b/a.jsonl", "https://host/a.jsonl?sig=S"]
)
def test_an_address_with_a_secret_is_refused_before_it_is_asked(address: str) -> None:
    with pytest.raises(UserError, match=r"holds .*; put that into an environment variable"):
        read_path(address)


@pytest.mark.parametrize(("address", "package"), [("s3://b/a.jsonl", "s3fs"), ("gs://b/a.jsonl", "gcsfs")])  # fmt: skip
def test_a_driver_that_is_missing_is_named(
    address: str, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match=f"package that is not installed: .*{package}"):
        numbers(address)


def test_hub_rows_and_their_fingerprint(monkeypatch: pytest.MonkeyPatch) -> None:
    table = datasets.Dataset.from_list([{"a": "x", "b": [1]}, {"a": "\0", "b": []}, {"a": "y", "b": []}])  # fmt: skip
    asked = []

    def load_dataset(name: str, config: str | None, *, split: str, revision: str | None) -> object:
        asked.append((name, config, split, revision))
        if split == "gone":
            raise ValueError("Unknown split 'gone'\nand more")
        return table

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    source = PlainSource(hub="me/set", config="en", revision="v1")
    bad = BadRows("skip")
    found = list(read_rows(source, bad))
    assert asked == [("me/set", "en", "train", "v1")]
    assert [(row.where, row.content) for row in found] == [
        ("me/set row 1", {"a": "x", "b": [1]}),
        ("me/set row 3", {"a": "y", "b": []}),
    ]
    assert bad.examples[0].startswith("me/set row 2 holds a NUL byte")
    assert fingerprint(source) == fingerprint(source) != fingerprint(replace(source, config=None))
    with pytest.raises(UserError, match=r"me/set \(split gone\) cannot be fetched: Unknown split"):
        list(read_rows(replace(source, split="gone")))
