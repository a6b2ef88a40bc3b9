"""The part of Go's template language that is carried out to prove an Ollama template."""

from __future__ import annotations

import pytest

from llamaweft.export.go_template import rendered

CHAT = [{"role": "system", "content": "S"}, {"role": "user", "content": "U"}]


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("plain\n text", "plain\n text"),
        ("{{ range $i, $_ := .Messages }}<{{ .Role }}|{{ .Content }}>{{ end }}!", "<system|S><user|U>!"),
        ("{{ range $i, $m := .Messages }}{{ $i }},{{ end }}", "0,1,"),
        (
            '{{ range $i, $_ := .Messages }}{{ if eq $i 0 }}first{{ else }}other{{ end }} {{ end }}',
            "first other ",
        ),
        (
            '{{ range $i, $_ := .Messages }}{{ if and (eq $i 0) (ne .Role "system") }}no{{ end }}'
            '{{ if or (eq $i 9) (eq .Role "user") }}yes{{ end }}{{ end }}',
            "yes",
        ),
        ('{{ "{{" }}', "{{"),
    ],
)  # fmt: skip
def test_a_template_is_carried_out(template: str, text: str) -> None:
    assert rendered(template, CHAT) == text


@pytest.mark.parametrize(
    "template",
    [
        "{{ if eq 1 1 }}never closed",
        "{{ end }}",
        "{{ range .Messages }}{{ end }}",
        "{{ .Role | trim }}",
        "{{ and (eq 1 1 }}",
    ],
)
def test_what_is_not_built_is_refused_and_never_skipped(template: str) -> None:
    with pytest.raises((ValueError, KeyError)):
        rendered(template, CHAT)
