"""Cards of facts that someone else wrote: whatever stands there, the page keeps its form and the head its keys.

A card with a nasty text in one place must have the same skeleton (blocks, tables, links, HTML) as a card with a plain
word there, as a Markdown parser sees it.
"""

from __future__ import annotations

import html
import re
from dataclasses import replace
from typing import Any

import pytest
from _loopback_cards import check_card
from huggingface_hub import ModelCard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from test_card import FACTS, RESULTS, gene
from test_card_descendant import CONFIG, descendant

from learngene_hub import card
from learngene_hub._card_facts import code, one_line, table, text
from learngene_hub.learngene import Learngene

NASTY = [
    "</details><script>alert(1)</script>",
    "a | b | c",
    "| a |\n|---|\n| b |",
    "# heading\n\n## Licence\n\nMIT",
    "x\n---\nlicense: mit\n---\n",
    "---",
    "===",
    "```\n\n# out",
    "~~~ ~~x~~",
    "`code` and ``more``",
    "`",
    "[x](https://evil.example)",
    "![x](javascript:alert(1))",
    "[a]: https://evil.example",
    "[^1]: note",
    "<https://evil.example>",
    "https://evil.example and www.evil.example and a@evil.example",
    "<img src=x onerror=alert(1)>",
    "<!-- ",
    "--> &lt;b&gt; &#60;i&#62;",
    "*a* **b** _c_ __d__ ~~e~~",
    "$$x$$ \\(y\\) \\",
    "\u202egnp.exe \x00\x1b[31m \ud800",
    "\u2028# x\u0085# y\r# z",
    "1. a",
    "12) a",
    "- a",
    "+ a",
    "> a",
    "    indented",
    "\t# tab",
    "!!python/object/apply:os.system [ls]",
    "{{ jinja }} {% raw %} ${HOME} $(ls)",
    "x" * 100_000,
    "",
    " ",
]
ODD = [
    *(10**5000, -1, True, float("nan"), float("inf"), [[[[]]]], {"a": {"b": {"c": {}}}}, b"bytes", {1: 2}, object()),
    *("\ud800", ["a", 1, None], {"a": [1, 2, 3]}, {"loss": {"64": [1, "x"]}}, {"images": "many"}),
]
WORDS = st.one_of(st.sampled_from(NASTY), st.text(max_size=40))
JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), WORDS),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(WORDS, inner, max_size=4)),
    max_leaves=12,
)
KNOWN = sorted({*FACTS, "federation", "wall_seconds", "width", "license_link", "log", "free"})
MARKDOWN = MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"])
SAID_OF_LEARNGENE = {
    *("license", "license_name", "license_link", "library_name", "pipeline_tag", "base_model", "base_model_relation"),
    *("datasets", "metrics", "tags", "model-index"),
}


LEARNGENE = gene()


def skeleton(page: str) -> list[str]:
    """Types of all blocks and of all inline parts but text, with what a link, an HTML tag or a fence says."""
    found = []
    for token in MARKDOWN.parse(page.split("\n---\n", 1)[1]):
        said = token.content if token.type in ("html_block", "html_inline") else token.info
        found.append(f"{token.type} {token.level} {said}")
        for inner in token.children or []:
            if inner.type not in ("text", "code_inline", "text_special"):
                content = inner.content if inner.type == "html_inline" else ""
                found.append(f"  {inner.type} {inner.attrs or ''} {content}")
    return found


def outside_code(page: str) -> str:
    body = re.sub(r"^```.*?^```", "", page.split("\n---\n", 1)[1], flags=re.DOTALL | re.MULTILINE)
    return re.sub(r"`[^`\n]*`", "", body)


def page_of(learngene: Learngene, **more: Any) -> str:
    """Its card. The digest is set, as ``load`` does: that of facts which no file can hold cannot be computed."""
    vars(learngene)["digest"] = "d" * 64
    usual = {"name": "pico", "source": "pico", "description": "Words.", "nbytes": 9, "results": None}
    return card.card_text(learngene, **(usual | more))


def placed(place: str, word: str) -> str:
    """A card in which ``word`` stands in one place."""
    learngene, facts = replace(LEARNGENE, settings={"form": "copy"}), dict(FACTS)
    if place in ("name", "description"):
        return page_of(learngene, **{place: word})
    if place == "license":
        return page_of(replace(learngene, license=word))
    if place.startswith("ancestor."):
        return page_of(replace(learngene, ancestor={**learngene.ancestor, place.partition(".")[2]: word}))
    if place == "setting":
        return page_of(replace(learngene, settings={"form": "copy", "key": word}))
    if place == "results":
        found = RESULTS | {"digests": {"lsamd-base": "d" * 64}}
        cells = [{**found["cells"][0], "shape": word, "set": word}]
        return page_of(learngene, results=found | {"cells": cells, "number": word})
    if place == "descendant":
        grown = {**CONFIG["learngene"], "name": word, "revision": word, "version": word, "digest": word}
        return descendant(CONFIG | {"learngene": grown, "label_names": ["cat", word]})
    facts |= {
        "data": {"data": {f"a{word}": {"images": 3}, "b": {"images": 4}}, "terms": {f"a{word}": "free"}},
        "terms": {"terms": {"signs": word}},
        "paths": {"paths": {word or "-": word}},
        "federation": {"federation": {"rounds": 3, "cluster": word, "layers": [word], "settings": {f"a{word}": word}}},
        "free key": {f"a{word}": 3},
        "free value": {"free": word},
    }.get(place, {place: word})
    return page_of(replace(learngene, provenance=facts))


PLACES = [
    *("name", "description", "license", "ancestor.name", "ancestor.source", "ancestor.license", "setting", "results"),
    *("data", "terms", "paths", "federation", "free key", "free value", "machine", "command", "descendant"),
]


@pytest.mark.parametrize("place", PLACES)
def test_a_nasty_text_stays_in_its_place(place: str) -> None:
    plain = placed(place, "word")
    bones, keys = skeleton(plain), ModelCard(plain).data.to_dict().keys()
    for word in NASTY:
        page = placed(place, word)
        if word.strip():  # an empty one may leave its paragraph out
            assert skeleton(page) == bones, (place, word[:60])
        assert check_card(page) == ([], []), (place, word[:60])
        data = ModelCard(page).data.to_dict()
        assert set(data) <= set(keys) | SAID_OF_LEARNGENE
        assert data["tags"][0] == "learngene" and len(page) < len(plain) + 3000 * len(page.splitlines())
        assert "evil" not in str(data.get("base_model", "")) + str(data.get("datasets", "")) and "://e" not in str(data)
        assert not re.search(r"://evil|www\.evil|@evil", outside_code(page)), (place, word[:60])
        assert all(c.isprintable() or c == "\n" for c in page), (place, word[:60])
        page.encode()  # no half of a surrogate pair


@pytest.mark.parametrize("word", [word for word in NASTY if word.strip() and len(word) < 1000])
def test_a_nasty_text_is_shown_as_it_is(word: str) -> None:
    for page, around in ((text(word), "{}"), (f"a {text(word)} b", "a {} b"), (f"**a:** {code(word)}", "a: {}")):
        shown = re.sub(r"</?(p|strong|code)>", "", MARKDOWN.render(page))
        assert html.unescape(shown).strip() == around.format(one_line(word)), page


@given(st.text(max_size=60))
@settings(max_examples=300, deadline=None)
def test_any_text_is_one_paragraph_of_text(word: str) -> None:
    for written in (text(word), code(word)):
        kinds = [token.type for token in MARKDOWN.parse(written)]
        assert kinds == (["paragraph_open", "inline", "paragraph_close"] if written else [])
        rows = MARKDOWN.parse(table(["a", "b"], [["x", written]]))
        assert [token.type for token in rows].count("td_open") == 2


@given(st.dictionaries(st.one_of(st.sampled_from(KNOWN), WORDS), JSON, max_size=8))
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_any_provenance_has_a_card(provenance: dict[str, Any]) -> None:
    page = page_of(replace(LEARNGENE, provenance=provenance))
    check_page(page)


@given(st.dictionaries(st.one_of(st.sampled_from(sorted(CONFIG)), WORDS), JSON, max_size=8), JSON)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_any_config_has_a_card(config: dict[str, Any], grown: Any) -> None:
    check_page(descendant(config | {"learngene": grown}))


def check_page(page: str) -> None:
    """Valid for the Hub; no HTML but ours, no link but to the paper, no picture, no heading but ours."""
    assert check_card(page) == ([], [])
    assert set(ModelCard(page).data.to_dict()) <= SAID_OF_LEARNGENE
    ours = {"Use", "Reach", "How it was made", "What the search found", "Width", "Measured", "Limits", "Licence"}
    ours |= {"Verify and pin", "Where it comes from", "Labels", "pico", "author/signs"}
    tokens = MARKDOWN.parse(page.split("\n---\n", 1)[1])
    for i, token in enumerate(tokens):
        if token.type == "heading_open":
            assert tokens[i + 1].content in ours
        if token.type in ("html_block", "fence"):
            known = ("<details><summary>All settings</summary>\n", "</details>\n", "</details>")
            assert token.content in known or token.info in ("python", "sh", "yaml")
        for inner in token.children or []:
            assert inner.type not in ("html_inline", "image", "em_open", "s_open", "hardbreak")
            assert inner.type != "link_open" or inner.attrs == {"href": "https://arxiv.org/abs/2605.08209"}


@pytest.mark.parametrize("place", KNOWN)
def test_facts_of_the_wrong_type_are_left_out(place: str) -> None:
    for odd in ODD:
        check_page(page_of(replace(LEARNGENE, provenance=FACTS | {place: odd})))


def test_deep_json_and_many_facts() -> None:
    deep: Any = 1
    for _ in range(100_000):
        deep = [deep]
    many = {f"fact {i}": "x" * 1000 for i in range(2000)}
    data = {f"set{i}": {"images": i} for i in range(5000)}
    page = page_of(
        replace(LEARNGENE, provenance={**many, "deep": deep, "data": data, "paths": dict.fromkeys(data, "B")})
    )
    check_page(page)
    assert len(page) < 100_000
