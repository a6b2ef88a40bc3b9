"""A page of HTML as the tests read it."""

from __future__ import annotations

from html.parser import HTMLParser


class WellFormed(HTMLParser):
    """The elements and attributes of a page; every element must be closed where it should be.

    void: those that are never closed.
    """

    void: frozenset[str]

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open, self.elements, self.attributes = [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.elements.append(tag)
        self.attributes += attrs
        if tag not in self.void:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self.open.pop() == tag
