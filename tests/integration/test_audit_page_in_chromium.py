"""The audit's page in headless Chromium: what a person sees, hears and types."""

from __future__ import annotations

import base64
import dataclasses
import json
import shutil
import subprocess
import time
import urllib.request
from pathlib import Path

import pytest

from llamaweft.data.audit_page import PageInput, PageRow, write_audit_page

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), ""
)
DRIVER = shutil.which("chromedriver") or ""
pytestmark = pytest.mark.skipif(
    not (CHROMIUM and DRIVER), reason="needs chromium and chromedriver (Debian: chromium-driver)"
)

EVIL = "</script><img src=x onerror=\"document.title='broken'\">{{ 7*7 }}<!-- <script>"
WORDS = [
    "the",
    "lamp",
    "in",
    "kitchen",
    "is",
    "on",
    "turn",
    "it",
    "off",
    "now",
    "and",
    "tell",
    "me",
]


class Browser:
    """A small client of the WebDriver protocol: open a page, run a script in it, press keys."""

    def __init__(self, port: int) -> None:
        self.root = f"http://127.0.0.1:{port}"
        arguments = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
        options = {"binary": CHROMIUM, "args": arguments}
        wanted = {"capabilities": {"alwaysMatch": {"goog:chromeOptions": options}}}
        self.root += "/session/" + self.call("POST", "/session", wanted)["sessionId"]

    def call(self, method: str, path: str, content: dict | None = None):
        body = None if content is None else json.dumps(content).encode()
        request = urllib.request.Request(self.root + path, body, method=method)
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)["value"]

    def protocol(self, command: str, **parameters):
        return self.call("POST", "/goog/cdp/execute", {"cmd": command, "params": parameters})

    def run(self, script: str, *arguments):
        return self.call("POST", "/execute/sync", {"script": script, "args": list(arguments)})

    def open(self, path: Path) -> None:
        self.call("POST", "/url", {"url": "about:blank"})
        self.call("POST", "/url", {"url": path.as_uri()})

    def wait(self, script: str, *arguments):
        """Until the script gives something true."""
        for _ in range(200):
            if value := self.run(script, *arguments):
                return value
            time.sleep(0.05)
        raise AssertionError(f"never true: {script}")

    def keys(self, *keys: str) -> None:
        for key in keys:
            text = {"text": key} if len(key) == 1 else {}
            self.protocol("Input.dispatchKeyEvent", type="keyDown", key=key, **text)
            self.protocol("Input.dispatchKeyEvent", type="keyUp", key=key)

    def size(self, width: int, height: int) -> None:
        self.protocol(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=width < 500,
        )

    def scheme(self, scheme: str) -> None:
        feature = {"name": "prefers-color-scheme", "value": scheme}
        self.protocol("Emulation.setEmulatedMedia", features=[feature])

    def screenshot(self, path: Path) -> None:
        path.write_bytes(base64.b64decode(self.call("GET", "/screenshot")))


@pytest.fixture(scope="module")
def browser():
    driver = subprocess.Popen([DRIVER, "--port=0"], stdout=subprocess.PIPE, text=True)
    try:
        line = next(line for line in driver.stdout if "successfully on port" in line)
        browser = Browser(int(line.rstrip(".\n").rsplit(" ", 1)[1]))
        browser.call("POST", "/timeouts", {"script": 30000, "pageLoad": 60000})
        yield browser
        browser.call("DELETE", "")
    finally:
        driver.terminate()
        driver.wait(timeout=30)
        driver.stdout.close()


def row(number: int, tokens: list[str], weights: list[float] | None = None, **changes) -> PageRow:
    weights = weights or [0.0] * (len(tokens) // 2) + [1.0] * (len(tokens) - len(tokens) // 2)
    what = {"where": f"chats.jsonl line {number}", "held_out": False, "findings": []} | changes
    return PageRow(tokens=tokens, weights=weights, **what)


def chat(number: int, length: int = 40, **changes) -> PageRow:
    words = [f" {WORDS[(number * 7 + i * i) % len(WORDS)]}" for i in range(length)]
    tokens = ["<|user|>", "\n", *words, f" {number}", "<|eot|>"]
    return row(number, tokens, **changes)


def page(rows: list[PageRow], **changes) -> PageInput:
    finding = {"count": 1, "share": 0.01, "remedy": "mend it"}
    what = PageInput(
        title="my chats",
        audit={
            "findings": [
                {"check": "role_order", "status": "passed", "count": 0, "share": 0.0, "examples": [], "remedy": "-"},
                finding | {"check": "duplicate", "status": "warning", "examples": ["chats.jsonl line 3"]},
                finding | {"check": "too_long", "status": "blocking", "examples": ["chats.jsonl line 900000"]},
            ],
            "rows": 5000, "validation_rows": 50, "tokens": 1000, "trained_tokens": 400, "longest_tokens": 60, "passed": False,
        },
        cleaning=[{"step": "normalise", "count": 3, "changed": 7, "examples": ["chats.jsonl line 9: ﬁne"]}],
        rows=rows,
        rows_in_all=len(rows),
        packs=[],
        pairs=[],
        lengths=[len(row.tokens) for row in rows],
        trained_shares=[0.5 for _ in rows],
        max_length_tokens=2048,
    )  # fmt: skip
    return dataclasses.replace(what, **changes)


def opened(browser: Browser, content: PageInput, folder: Path) -> Browser:
    """The page at its first tab, on a wide screen, with its rows unpacked."""
    write_audit_page(content, folder / "report.html")
    browser.size(1280, 900)
    browser.open(folder / "report.html")
    browser.wait("return !document.querySelector('.plain')")
    return browser


def choose(browser: Browser, part: str) -> None:
    browser.run("document.getElementById(arguments[0] + '-tab').click()", part)
    browser.wait("return !document.getElementById(arguments[0]).hidden", part)


def filtered(browser: Browser, **wanted: str) -> str:
    """What the page says after these fields of the form were filled."""
    script = """
        const form = document.querySelector("form");
        form.reset();
        for (const [name, value] of Object.entries(arguments[0])) form.elements[name].value = value;
        form.dispatchEvent(new Event("input"));
        return document.querySelector("#examples .count").textContent;"""
    return browser.run(script, wanted)


def texts(browser: Browser, selector: str) -> list[str]:
    return browser.run(
        "return [...document.querySelectorAll(arguments[0])].map(n => n.textContent)", selector
    )


def test_what_data_holds_is_shown_as_text(browser, tmp_path):
    evil_row = row(1, ["a", EVIL], [0, 1], where=EVIL, findings=[EVIL])
    finding = {
        "check": EVIL,
        "status": "blocking",
        "count": 1,
        "share": 1.0,
        "examples": [EVIL],
        "remedy": EVIL,
    }
    pair = {
        "kind": EVIL,
        "left": EVIL,
        "right": EVIL,
        "left_text": EVIL,
        "right_text": EVIL,
        "shared": EVIL,
    }
    cleaning = [{"step": EVIL, "count": 1, "changed": 0, "examples": [EVIL]}]
    content = page(
        [evil_row],
        title=EVIL,
        audit={"findings": [finding]},
        cleaning=cleaning,
        pairs=[pair],
        packs=[[0]],
    )
    opened(browser, content, tmp_path)
    for selector in (
        "h1", "th a[data-check]", "td a[data-find]", "td.wide", "li strong",
        "#examples .trained .token", "#examples h3", ".badge.finding", "#packs h3", "#pairs mark", "#pairs h3",
    ):  # fmt: skip
        assert EVIL in texts(browser, selector), selector
    assert browser.run("return document.title") == f"{EVIL}: audit of the data"
    assert browser.run("return document.images.length + document.scripts.length") == 2
    filtered(browser, check=f"is {EVIL}")
    assert texts(browser, "#examples h3") == [EVIL]


def test_a_script_that_got_in_would_not_run(browser, tmp_path):
    opened(browser, page([chat(1)]), tmp_path)
    browser.run("""
        const script = document.createElement("script");
        script.textContent = "document.title = 'broken'";
        document.body.append(script);
        document.body.insertAdjacentHTML("beforeend", `<img src=x onerror="document.title='broken'">`);""")
    time.sleep(0.3)
    assert browser.run("return document.title") == "my chats: audit of the data"


def test_tokens_say_whether_they_are_trained(browser, tmp_path):
    tokens = ["<|user|>", "hi", "\n", "yes", "😀", " now", "<|eot|>"]
    opened(browser, page([row(1, tokens, [0, 0, 0, 1, 0.5, 0.5, 2])]), tmp_path)
    choose(browser, "examples")
    assert texts(browser, "#examples .token") == tokens
    assert texts(browser, "#examples .list .run.trained .token") == tokens[3:]
    assert texts(browser, "#examples .list .weight") == ["\u00d70.5", "\u00d72"]
    titles = browser.run(
        "return [...document.querySelectorAll('#examples .token')].map(n => n.title)"
    )
    assert titles[2] == "token 3 of 7, context"
    assert titles[4] == "token 5 of 7, trained, weight 0.5"
    style = "const s = getComputedStyle(document.querySelector(arguments[0])); return [s.textDecorationLine, s.backgroundColor]"
    trained, context = (
        browser.run(style, f"#examples .list .run{kind}") for kind in (".trained", "")
    )
    assert trained[0] == "underline"
    assert context[0] == "none"
    assert trained[1] != context[1]


def test_arrow_keys_go_from_token_to_token(browser, tmp_path):
    opened(browser, page([row(1, ["a", "b", "c"], [0, 1, 1])]), tmp_path)
    choose(browser, "examples")
    browser.run("document.querySelector('#examples .tokens').focus()")
    browser.keys("ArrowRight", "ArrowRight", "ArrowRight", "ArrowRight", "ArrowLeft")
    assert texts(browser, "#examples [aria-live]") == ["“b”: token 2 of 3, trained, weight 1"]


def test_only_one_page_of_thousands_is_in_the_document(browser, tmp_path):
    opened(browser, page([chat(n) for n in range(1, 1002)], rows_in_all=7000), tmp_path)
    choose(browser, "examples")
    assert "This page holds 1,001 rows of 7,000." in texts(browser, "#examples > p")[0]
    assert texts(browser, "#examples h3") == [f"chats.jsonl line {n}" for n in range(1, 21)]
    browser.run("document.querySelectorAll('#examples .pager button')[1].focus()")
    browser.keys(" ")
    assert texts(browser, "#examples h3")[0] == "chats.jsonl line 21"
    assert texts(browser, "#examples .count") == ["1,001 rows of 1,001, page 2 of 51"]
    browser.run(
        "const f = document.querySelector('#examples .pager input'); f.value = 999; f.onchange()"
    )
    assert texts(browser, "#examples h3") == ["chats.jsonl line 1001"]
    assert texts(browser, "#examples .count") == ["1,001 rows of 1,001, page 51 of 51"]


def test_search_finds_text_places_findings_and_sides(browser, tmp_path):
    rows = [
        row(3, ["Turn", " the", " la", "mp", " on"], findings=["duplicate"]),
        row(30, ["turn", " the\nRADIO", " (a|b)*"], held_out=True),
        row(4, ["nothing", " found"], findings=["duplicate", "too_long"]),
    ]
    opened(browser, page(rows), tmp_path)
    assert filtered(browser) == "3 rows of 3"
    assert filtered(browser, find="THE LAMP") == "1 row of 3"
    assert texts(browser, "#examples .hit") == [" the", " la", "mp"]
    assert filtered(browser, find="the  radio") == "1 row of 3"
    assert filtered(browser, find="(a|b)*") == "1 row of 3"
    assert filtered(browser, find="line 3") == "2 rows of 3"
    assert filtered(browser, find="chats.jsonl line 3") == "1 row of 3"
    assert filtered(browser, check="is duplicate") == "2 rows of 3"
    assert filtered(browser, check="none") == "1 row of 3"
    assert filtered(browser, check="some", find="turn") == "1 row of 3"
    assert filtered(browser, side="held-out") == "1 row of 3"
    assert filtered(browser, side="train", find="radio") == "0 rows of 3"


def test_the_checks_lead_to_their_rows(browser, tmp_path):
    rows = [chat(1), chat(2, findings=["duplicate"]), chat(3, findings=["duplicate"])]
    opened(browser, page(rows), tmp_path)
    browser.run("document.querySelector('[data-check=duplicate]').click()")
    assert texts(browser, "#examples h3") == ["chats.jsonl line 2", "chats.jsonl line 3"]
    assert browser.run("return document.activeElement.textContent") == "2 rows of 3"
    choose(browser, "overview")
    browser.run("document.querySelector('[data-find]').click()")
    assert texts(browser, "#examples h3") == ["chats.jsonl line 3"]
    assert browser.run("return document.getElementById('overview').hidden") is True


def test_search_over_5000_rows_of_300_tokens_does_not_freeze(browser, tmp_path):
    opened(browser, page([chat(n, 297) for n in range(5000)]), tmp_path)
    choose(browser, "examples")
    script = """
        const form = document.querySelector("form"), times = [];
        for (const text of arguments[0]) {
          const begin = performance.now();
          form.elements.find.value = text;
          form.dispatchEvent(new Event("input"));
          document.body.offsetHeight;
          times.push(performance.now() - begin);
        }
        return times;"""
    times = browser.run(script, ["t", "KITCHEN is", "nowhere", "line 4999", "4999", ""])
    assert max(times) < 2000, times
    assert browser.run("return document.querySelectorAll('*').length") < 20_000


def test_a_long_row_is_shown_around_what_was_searched_and_whole_on_request(browser, tmp_path):
    tokens = [f" w{n}" for n in range(1000)]
    opened(browser, page([row(1, tokens)]), tmp_path)
    choose(browser, "examples")
    assert texts(browser, "#examples .token") == tokens[:800]
    filtered(browser, find="w900")
    assert texts(browser, "#examples .hit") == [" w900"]
    assert texts(browser, "#examples .token") == tokens[200:]
    browser.run("document.querySelector('#examples .under button').click()")
    assert texts(browser, "#examples .token") == tokens


def test_packs_show_where_documents_end(browser, tmp_path):
    rows = [row(1, ["a", "b"]), row(2, ["c"]), row(3, ["d", "e", "f"])]
    opened(browser, page(rows, packs=[[2, 0], [1]]), tmp_path)
    choose(browser, "packs")
    assert texts(browser, "#packs article > h3") == ["Pack 1: 2 documents, 5 tokens"]
    assert texts(browser, "#packs .document h3") == ["chats.jsonl line 3", "chats.jsonl line 1"]
    assert texts(browser, "#packs .token") == ["d", "e", "f", "a", "b"]
    assert (
        "document 2 of 2, 4 to 5 of the pack"
        in texts(browser, "#packs .document:last-child .about")[0]
    )
    line = "return getComputedStyle(document.querySelector('.document .about')).borderTopStyle"
    assert browser.run(line) == "dashed"
    browser.run("document.querySelectorAll('#packs .pager button')[1].click()")
    assert texts(browser, "#packs article > h3") == ["Pack 2: 1 document, 1 token"]


def test_pairs_stand_side_by_side_with_the_shared_text_marked(browser, tmp_path):
    pair = {"kind": "leak", "left": "a line 1", "right": "b line 2", "shared": "turn on the lamp"}
    pair |= {"left_text": "Please turn on the lamp.", "right_text": "TURN on, the lamp!"}
    opened(browser, page([chat(1)], pairs=[pair]), tmp_path)
    choose(browser, "pairs")
    assert texts(browser, "#pairs .text mark") == ["turn on the lamp", "TURN on, the lamp"]
    assert texts(browser, "#pairs .text") == [pair["left_text"], pair["right_text"]]
    left, right = browser.run(
        "return [...document.querySelectorAll('.side')].map(n => n.getBoundingClientRect().top)"
    )
    assert left == right


def full(rows: int = 60) -> PageInput:
    long = "a_very_long_name_without_any_place_to_break_it_" * 3
    pair = {
        "kind": "duplicate",
        "left": long,
        "right": long,
        "left_text": long,
        "right_text": long,
        "shared": long,
    }
    finding = {
        "check": long,
        "status": "blocking",
        "count": 9,
        "share": 0.5,
        "examples": [long] * 5,
        "remedy": long,
    }
    some = [chat(n, findings=["duplicate"]) for n in range(rows)]
    some[0] = row(0, [long, "\n", long], where=long, findings=[long])
    return page(some, title=long, packs=[[0, 1, 2]], pairs=[pair], audit={"findings": [finding]})


@pytest.mark.parametrize(
    "content", [page([chat(n) for n in range(60)]), full()], ids=["usual", "long names"]
)
def test_a_phone_scrolls_tables_and_never_the_page(browser, tmp_path, content):
    opened(browser, content, tmp_path)
    browser.size(360, 740)
    for part in browser.run(
        "return [...document.querySelectorAll('main > section')].map(n => n.id)"
    ):
        choose(browser, part)
        assert browser.run("return document.documentElement.scrollWidth") <= 360, part
    choose(browser, "overview")
    assert browser.run(
        "const s = document.querySelector('.scroll'); return s.scrollWidth > s.clientWidth"
    )


def test_dark_is_dark(browser, tmp_path):
    opened(browser, full(), tmp_path)
    light, dark = [], []
    for scheme, seen in (("light", light), ("dark", dark)):
        browser.scheme(scheme)
        browser.screenshot(tmp_path / f"{scheme}.png")
        seen += browser.run(
            "const s = getComputedStyle(document.body); return [s.backgroundColor, s.color]"
        )
    browser.scheme("light")
    assert light == ["rgb(255, 255, 255)", "rgb(27, 31, 36)"]
    assert dark == ["rgb(20, 23, 27)", "rgb(228, 231, 235)"]
    assert (tmp_path / "light.png").read_bytes() != (tmp_path / "dark.png").read_bytes()


def test_keys_and_screen_readers_find_their_way(browser, tmp_path):
    opened(browser, full(), tmp_path)
    browser.run("document.querySelector('[role=tab][aria-selected=true]').focus()")
    browser.keys("ArrowRight")
    browser.wait("return !document.getElementById('examples').hidden")
    assert browser.run("return document.activeElement.id") == "examples-tab"
    assert texts(browser, "[role=tab][aria-selected=true]") == ["Examples"]
    browser.keys("ArrowLeft", "ArrowLeft")
    browser.wait("return !document.getElementById('pairs').hidden")
    unnamed = """return [...document.querySelectorAll("input, select, section, nav, .scroll, .tokens, svg[role]")]
        .filter(n => !n.labels?.length && !n.getAttribute("aria-label")).map(n => n.outerHTML)"""
    assert browser.run(unnamed) == []
    assert (
        browser.run("return document.querySelector('#examples .count').getAttribute('role')")
        == "status"
    )
    assert texts(browser, "#examples .list .spoken")[:2] == [" (trained) ", " (end of trained) "]


def test_nothing_is_loaded(browser, tmp_path):
    opened(browser, full(), tmp_path)
    assert browser.run("return performance.getEntriesByType('resource').map(r => r.name)") == []


@pytest.mark.parametrize("lacks", ["script", "DecompressionStream"])
def test_an_old_browser_shows_the_first_rows(browser, tmp_path, lacks):
    write_audit_page(page([chat(n) for n in range(1, 31)]), tmp_path / "report.html")
    if lacks == "script":
        browser.protocol("Emulation.setScriptExecutionDisabled", value=True)
    else:
        source = "delete window.DecompressionStream"
        added = browser.protocol("Page.addScriptToEvaluateOnNewDocument", source=source)
    try:
        browser.open(tmp_path / "report.html")
        time.sleep(0.5)
        assert texts(browser, "#examples h3") == [f"chats.jsonl line {n}" for n in range(1, 11)]
        assert texts(browser, "#examples .run.trained")[1].endswith("<|eot|>")
        assert "2023" in texts(browser, ".plain")[0]
        assert browser.run("return document.querySelector('form').hidden") is True
    finally:
        if lacks == "script":
            browser.protocol("Emulation.setScriptExecutionDisabled", value=False)
        else:
            browser.protocol(
                "Page.removeScriptToEvaluateOnNewDocument", identifier=added["identifier"]
            )


def test_the_way_back_leads_to_the_part_before(browser, tmp_path):
    opened(browser, full(), tmp_path)
    choose(browser, "packs")
    choose(browser, "pairs")
    browser.run("history.back()")
    browser.wait("return !document.getElementById('packs').hidden")
    assert texts(browser, "[role=tab][aria-selected=true]") == ["Packs"]
    browser.call("POST", "/refresh", {})
    browser.wait("return document.querySelector('#packs .token')")
    assert browser.run("return document.getElementById('packs').hidden") is False
