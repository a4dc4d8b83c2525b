"""Blocks to lines: what a reader sees, at any width."""

from __future__ import annotations

import time
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.cells import cell_len

from qwen2_tui.markdown.blocks import Block, Blocks
from qwen2_tui.markdown.code import highlight, language
from qwen2_tui.markdown.document import KEPT, Document
from qwen2_tui.markdown.ink import ADDRESS, BOLD, CODE, FLAGS, ITALIC, LINK, STRIKE, Kind, ink
from qwen2_tui.markdown.inline import BRACKETS, closed, runs
from qwen2_tui.markdown.render import MEASURE, Line, estimate, render
from qwen2_tui.markdown.wrap import chop, spans, wrap

MIXED = """# A heading that is longer than a narrow terminal is wide

Some **bold and *both*** words, `code`, ~~gone~~, [the atlas](https://example.org/老挝), 中文字符，包括标点（这样）的句子。👨‍👩‍👧 🎉

1. one
   - nested, and long enough to be wrapped at most widths that are tested here
     > quoted
10. ten

| River | Length | A column of notes |
|:--|--:|:-:|
| Mekong | 4,350 km | crosses **six** countries, 和很多的城市 |
| Nam Ou | 448 km | x<br>y |

```python
def rivers(names: list[str]) -> None:  # 长长的注释，比终端宽
\tpass
```
- [x] done
---
"""


def lines(text: str, width: int = 60) -> list[str]:
    document = Document(text, width)
    document.finish()
    document.prepare(0, document.height)
    while document.prepare(0, document.height):
        pass
    return [document.line(number).text.rstrip() for number in range(document.height)]


# Inline.


def test_inks_of_a_line() -> None:
    assert runs("a **b *c*** `d` ~~e~~") == (
        ("a ", ink(Kind.TEXT)),
        ("b ", ink(Kind.TEXT, BOLD)),
        ("c", ink(Kind.TEXT, BOLD | ITALIC)),
        (" ", ink(Kind.TEXT)),
        ("d", ink(Kind.TEXT, CODE)),
        (" ", ink(Kind.TEXT)),
        ("e", ink(Kind.TEXT, STRIKE)),
    )


@pytest.mark.parametrize(
    ("text", "seen"),
    [
        ("[the atlas](https://x.y/老)", "the atlas (https://x.y/老)"),
        ("<https://x.y>", "https://x.y"),
        ("[https://x.y](https://x.y)", "https://x.y"),
        ("[run](javascript:alert(1))", "run (javascript:alert(1))"),
        ("![a map](map.png)", "a map (map.png)"),
        ("<b>bold</b> &amp; a<br>b", "<b>bold</b> & a\nb"),
        ("one\ntwo", "one\ntwo"),
        ("\\*no\\*", "*no*"),
        ("[not a link]", "[not a link]"),
    ],
)
def test_what_is_seen_of_links_and_the_like(text: str, seen: str) -> None:
    assert "".join(part for part, _ in runs(text)) == seen


@pytest.mark.parametrize(
    ("text", "bold"),
    [
        ("**重要：**请注意", ["重要："]),
        ("这是**“引用”**的", ["“引用”"]),
        ("请看**加粗**文字，**再**看", ["加粗", "再"]),
        ("**注意**：**一**、**二**。", ["注意", "一", "二"]),
        ("中`**`文**（粗）**字", ["（粗）"]),
        ("中**文", []),
        ("é **a** b", ["a"]),
    ],
)
def test_bold_without_spaces_around_it(text: str, bold: list[str]) -> None:
    made = runs(text)
    assert [part for part, colour in made if colour % FLAGS == BOLD] == bold
    assert "".join(part for part, _ in made) == (text.replace("**", "").replace("``", "**") if bold else text)


def test_links_and_their_addresses_have_inks_of_their_own() -> None:
    assert [colour % FLAGS for _, colour in runs("[a](b)")] == [LINK, ADDRESS]


@pytest.mark.parametrize(
    ("written", "seen"),
    [
        ("see **bo", "see bo"),
        ("see **bold** and", "see bold and"),
        ("see *it", "see it"),
        ("see `co", "see co"),
        ("see `**co", "see **co"),
        ("see [at](http", "see at (http)"),
        ("see **", "see"),
        ("2 * 3 = ", "2 * 3 ="),
        ("**a *b", "a b"),
        ("a `b` **c", "a b c"),
        ("**a**\nb*c", "a\nbc"),
        ("``a`b`` **c", "a`b c"),
        ("**重要：**请", "重要：请"),
    ],
)
def test_what_is_still_written_shows_no_signs_that_wait_for_their_pair(written: str, seen: str) -> None:
    assert "".join(part for part, _ in runs(closed(written))).rstrip() == seen


@pytest.mark.parametrize("sign", ["[", "![", "*", "_", "`", "<", "a*_", "[a](", "\\", "&", "]", "~~", "<!--", "*a **a ", "`a``b", "**é"])
def test_signs_without_end_are_cheap(sign: str) -> None:
    text = (sign * 4096)[:4096]
    began = time.process_time()
    for one in (text, f"é{text}**é"):
        runs(one)
        closed(one)
    assert time.process_time() - began < 0.5


def test_too_many_brackets_are_no_links() -> None:
    text = "[a](b) " * (BRACKETS + 1)
    assert runs(text) == ((text, ink(Kind.TEXT)),)
    assert len(runs("[a](b) " * BRACKETS)) == 3 * BRACKETS


# Lines.


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("one two three", ["one two", "three"]),
        ("onetwothree", ["onetwoth", "ree"]),
        ("中文字符，测试", ["中文字", "符，测试"]),  # never a comma at the start of a line
        ("中文字（这样）", ["中文字", "（这样）"]),
        ("a 👨‍👩‍👧👨‍👩‍👧👨‍👩‍👧👨‍👩‍👧", ["a 👨‍👩‍👧👨‍👩‍👧👨‍👩‍👧", "👨‍👩‍👧"]),
        ("", [""]),
        ("   a bb cc", ["   a bb", "cc"]),
        ("a    b", ["a    b"]),
        ("exactly8 more", ["exactly8", "more"]),
    ],
)
def test_where_lines_break(text: str, expected: list[str]) -> None:
    assert [text[start:end] for start, end in spans(text, 8)] == expected


def test_lines_know_what_joined_them() -> None:
    made = list(wrap([("one two three\nfooooooour 中文字符", ink(Kind.TEXT))], 8))
    assert ["".join(text for text, _ in line) + joint for line, joint in made] == ["one two ", "three\n", "fooooooo", "ur 中文", "字符\n"]


@given(st.lists(st.sampled_from([*"ab ,。中（é🎉`*", "\u0301", "👨‍👩‍👧", "☑\ufe0f"]), max_size=60).map("".join), st.integers(2, 12))
@settings(max_examples=200, deadline=None)
def test_no_line_is_wider_than_it_may_be_and_nothing_is_lost(text: str, width: int) -> None:
    parts = [text[start:end] for start, end in spans(text, width)]
    assert max(cell_len(part) for part in parts) <= width
    assert "".join(parts).replace(" ", "") == text.replace(" ", "")


@given(st.text(alphabet="ab 中🎉\u0301", max_size=40), st.integers(2, 9))
@settings(max_examples=100, deadline=None)
def test_code_is_cut_without_losing_a_space(text: str, width: int) -> None:
    rows = chop([(text[:7], ink(Kind.CODE)), (text[7:], ink(Kind.NAME))], width)
    assert "".join(part for row in rows for part, _ in row) == text
    assert max(sum(cell_len(part) for part, _ in row) for row in rows) <= width + 1


@pytest.mark.parametrize("width", [20, 26, 40, 59, 60, 99, 100, 160, 300])
def test_everything_keeps_to_the_width(width: int) -> None:
    assert max(map(cell_len, lines(MIXED, width))) <= width


def test_prose_is_no_wider_than_reads_well() -> None:
    assert max(map(cell_len, lines("word " * 100, 300))) <= MEASURE


def test_a_document() -> None:
    assert lines(MIXED, 60)[:14] == [
        "A heading that is longer than a narrow terminal is wide",
        "",
        "Some bold and both words, code, gone, the atlas",
        "(https://example.org/老挝), 中文字符，包括标点（这样）的句",
        "子。👨‍👩‍👧 🎉",
        "",
        " 1. one",
        "     ◦ nested, and long enough to be wrapped at most widths",
        "       that are tested here",
        "",
        "       ▎ quoted",
        " 2. ten",
        "",
        "River  │   Length │          A column of notes",
    ]


# Tables.


def test_columns_are_aligned() -> None:
    assert lines("| a | bb | c |\n|--|-:|:-:|\n| 长的 | 1 | mid |\n| x | 22 |\n") == [
        "a    │ bb │  c",
        "─────┼────┼────",
        "长的 │  1 │ mid",
        "x    │ 22 │",
    ]


def test_a_table_too_wide_is_wrapped_with_rules_between_rows() -> None:
    shown = lines("| a | b |\n|---|---|\n| short | " + "word " * 12 + "|\n| x | y |\n", 40)
    assert shown[0].startswith("a     │ b")
    assert shown[2].startswith("short │ word word")
    assert shown[3].startswith("      │ word")
    assert sum("┼" in line for line in shown) == 2
    assert max(map(cell_len, shown)) <= 40


def test_far_too_narrow_for_a_table_rows_are_records() -> None:
    assert lines("| Name | Length | Of |\n|---|---|---|\n| Mekong | 4,350 | |\n| Nam Ou | 448 | x |\n", 20) == [
        "Name: Mekong", "Length: 4,350", "────────────", "Name: Nam Ou", "Length: 448", "Of: x"
    ]  # fmt: skip


# Code.


def test_python_in_colours() -> None:
    shown = list(highlight("python", ["def f(x):", '    """Doc', '    string"""', "    return 1  # so"]))
    assert shown[0][0] == ("def", ink(Kind.KEYWORD))
    assert ("f", ink(Kind.NAME)) in shown[0]
    assert {colour for _, colour in shown[2]} == {ink(Kind.STRING)}  # a line of a string that began above
    assert shown[3][-1] == ("# so", ink(Kind.COMMENT))


@pytest.mark.parametrize("name", ["c", "javascript", "java", "go", "css", "rust", "sql"])
def test_a_comment_over_lines(name: str) -> None:
    shown = list(highlight(name, ["/* one", "two return", "three */ x"]))
    assert shown[1] == (("two return", ink(Kind.COMMENT)),)
    assert shown[2][0] == ("three */", ink(Kind.COMMENT))
    assert {colour for text, colour in shown[2][1:] if text.strip()} & {ink(Kind.COMMENT)} == set()


def test_what_only_looks_like_a_comment_is_none() -> None:
    assert list(highlight("bash", ["ls /tmp/*", "echo hi"]))[1] != (("echo hi", ink(Kind.COMMENT)),)
    assert ("1", ink(Kind.NUMBER)) in list(highlight("c", ['char *a = "/*";', "int x = 1;"]))[1]
    assert ("1", ink(Kind.NUMBER)) in list(highlight("c", ["// a /* b", "int x = 1;"]))[1]


@pytest.mark.parametrize(
    "name", ["json", "yaml", "html", "diff", "console", "php", "toml", "makefile", "no such language", "", "text", "css", "ruby"]
)
def test_no_grammar_changes_the_text(name: str) -> None:
    code = ["a: [1, {'b': true}] <p class='x'>&amp;</p>", "", "- x", "+ y  ", "$ ls | wc /* */ # `é` 中", "<?php echo 1; ?>", "\x01\\"]
    assert ["".join(text for text, _ in line) for line in highlight(name, code)] == code


def test_the_language_of_a_fence() -> None:
    assert [language(info) for info in ("py", "python title=x", "{.rust}", "c++", "", "js,linenos", "x" * 99)] == [
        "py", "python", "rust", "c++", "", "js", "x" * 24
    ]  # fmt: skip


def test_hostile_code_is_cheap() -> None:
    began = time.process_time()
    for name in ("python", "javascript", "bash", "html", "perl"):
        list(highlight(name, ["(" * 400, "<" * 5000, "\\" * 400, "`" * 399, "/*" * 200, "a" * 4000] * 4))
    assert time.process_time() - began < 3.0


def test_a_code_block_has_its_language_above_and_fills_its_width() -> None:
    document = Document("```python\nx = 1\n" + "y" * 70 + "\n```", 40)
    document.finish()
    made = document.lines(0)
    assert [cell_len(line.text) for line in made] == [40] * 4
    assert made[0].text.strip() == "python"
    assert [line.joint for line in made] == ["", "\n", "", "\n"]
    assert [line.text[line.start :].rstrip() for line in made] == ["", "x = 1", "y" * 37, "y" * 33]


# Documents.


@given(st.lists(st.integers(0, len(MIXED)), max_size=12), st.sampled_from([24, 60, 120]))
@settings(max_examples=60, deadline=None)
def test_a_streamed_document_ends_as_the_whole_one(cuts: list[int], width: int) -> None:
    places = sorted({*cuts, 0, len(MIXED)})
    document = Document("", width)
    for start, end in pairwise(places):
        document.feed(MIXED[start:end])
        document.prepare(0, document.height)
    document.finish()
    assert [document.line(number).text.rstrip() for number in range(settled(document))] == lines(MIXED, width)


def settled(document: Document) -> int:
    while document.prepare(0, document.height):
        pass
    return document.height


def test_inks_are_the_same_too() -> None:
    document = Document("", 60)
    for character in MIXED:
        document.feed(character)
        document.prepare(0, document.height)
    document.finish()
    whole = Document(MIXED, 60)
    whole.finish()
    assert [document.line(number) for number in range(settled(document))] == [whole.line(number) for number in range(settled(whole))]


def test_lines_that_stay_the_same_are_the_same_objects() -> None:
    document = Document("a\nb\n\n```\nx\n", 40)
    settled(document)
    before = [document.line(number) for number in range(document.height)]
    document.feed("y\n")
    settled(document)
    after = [document.line(number) for number in range(document.height)]
    assert all(one is other for one, other in zip(before, after, strict=False))


def test_a_document_renders_what_is_asked_for_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    rendered: list[Block] = []

    def counting(block: Block, width: int) -> list[Line]:
        rendered.append(block)
        return render(block, width)

    monkeypatch.setattr("qwen2_tui.markdown.document.render", counting)
    document = Document("word\n\n" * 10_000, 60)
    document.finish()
    document.prepare(document.height - 40, document.height)
    assert 10 < len(rendered) < 60
    document.prepare(0, 40)
    assert len(rendered) < 120


def test_places_hold_while_heights_are_corrected() -> None:
    document = Document("| a | b |\n|---|---|\n| c | d |\n\n" * 50 + "the place\n", 30)
    document.finish()
    block, line = document.place(document.height - 1)
    assert document.lines(block)[line].text == "the place"
    settled(document)
    assert document.line(document.number(block, line)).text == "the place"


def test_lines_far_away_are_forgotten() -> None:
    document = Document("word\n\n" * (3 * KEPT), 60)
    document.finish()
    for first in range(0, document.height, 40):
        document.prepare(first, first + 40)
    assert sum(lines is not None for lines in document._lines) <= KEPT + 41
    assert document.line(0).text == "word"


def test_code_is_given_back_as_it_was_written() -> None:
    document = Document("a\n```make\nall:\n\techo **x**\n```\n- ```\n  y\n  ```\n" + "```c\n" + "z;\n" * 250, 60)
    document.finish()
    assert [document.code(which) for which in range(3)] == ["all:\n\techo **x**", "y", "\n".join(["z;"] * 250 + [""])[:-1]]
    assert len(document.codes()) == 3


@pytest.mark.parametrize("width", [20, 80])
def test_estimates_are_near(width: int) -> None:
    made = Blocks()
    made.feed(MIXED * 5 + "word " * 300)
    made.finish()
    guessed = sum(estimate(block, width) for block in made.settled)
    real = sum(len(render(block, width)) for block in made.settled)
    assert real / 2 < guessed < real * 2


@pytest.mark.parametrize(
    "text", ["[" * 200_000, ">" * 200_000, "*a_ " * 50_000, "x" * 200_000, "`" * 200_000, "```py\n" + "f(x)\n" * 40_000, "|a" * 99_999]
)
def test_a_screen_of_hostile_text_is_quickly_there(text: str) -> None:
    began = time.process_time()
    document = Document(text, 80)
    document.finish()
    document.prepare(document.height // 2, document.height // 2 + 40)
    assert time.process_time() - began < 0.7
