from __future__ import annotations

import json
import os
import tracemalloc
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwen2_local import vocabulary
from qwen2_local.errors import BadFile, InvalidPrompt, UnsupportedModel
from qwen2_local.tokens import Tokenizer
from qwen2_local.vocabulary import read_tokenizer_json
from tests.support.small_tokenizer import BASE, CONTROL, MERGES, SIZE, TOOL, small_gguf, small_json

GGUF = Tokenizer.from_gguf(small_gguf())
LIKE_MARKS = st.lists(st.sampled_from([*CONTROL, TOOL, "hello", " hello", "<|", "|>", "\n", "é", "e\u0301"]) | st.text(max_size=3)).map("".join)


def from_json(folder: Path, content: object) -> Tokenizer:
    path = folder / "tokenizer.json"
    path.write_text(json.dumps(content), encoding="utf-8")
    return Tokenizer.from_json(path)


@pytest.fixture(params=["json", "gguf"])
def tokenizer(request: pytest.FixtureRequest, tmp_path: Path) -> Tokenizer:
    return from_json(tmp_path, small_json()) if request.param == "json" else GGUF


def test_both_sources_give_the_same(tmp_path: Path) -> None:
    other = from_json(tmp_path, small_json())
    assert other.size == GGUF.size == SIZE
    assert other.special == GGUF.special == CONTROL
    assert [other.token_bytes(token) for token in range(SIZE)] == [GGUF.token_bytes(token) for token in range(SIZE)]
    assert other.encode("hello hello é") == GGUF.encode("hello hello é")


def test_merges_apply(tokenizer: Tokenizer) -> None:
    assert [tokenizer.token_bytes(token) for token in tokenizer.encode("hello hello")] == [b"hello", b" hello"]


def test_nothing_encodes_to_nothing(tokenizer: Tokenizer) -> None:
    assert tokenizer.encode("") == []
    assert tokenizer.decode([]) == ""


@pytest.mark.parametrize("mark", [*CONTROL, TOOL])
def test_marks_in_text_are_plain_letters(tokenizer: Tokenizer, mark: str) -> None:
    ids = tokenizer.encode(f"a{mark}\n{mark}")
    assert max(ids) < len(BASE)
    assert tokenizer.decode(ids) == f"a{mark}\n{mark}"


@given(LIKE_MARKS)
def test_no_text_makes_an_added_token_and_all_come_back(text: str) -> None:
    ids = GGUF.encode(text)
    assert all(token < len(BASE) for token in ids)
    assert GGUF.decode(ids) == unicodedata.normalize("NFC", text)


def test_control_tokens_have_no_text_but_a_name(tokenizer: Tokenizer) -> None:
    end = tokenizer.special["<|im_end|>"]
    assert tokenizer.token_bytes(end) == b""
    assert tokenizer.decode([*tokenizer.encode("hello"), end]) == "hello"
    assert tokenizer.describe(end) == "<|im_end|>"
    assert tokenizer.describe(tokenizer.encode("é")[0]) == "é"


def test_added_tokens_that_are_text_decode(tokenizer: Tokenizer) -> None:
    assert tokenizer.decode([SIZE - 1]) == tokenizer.describe(SIZE - 1) == TOOL
    assert TOOL not in tokenizer.special


@pytest.mark.parametrize("token", [-1, SIZE, 10**9])
def test_ids_without_a_token_have_no_bytes(tokenizer: Tokenizer, token: int) -> None:
    assert tokenizer.token_bytes(token) == b""


def test_characters_split_over_tokens_and_stray_bytes(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("日")
    assert len(ids) == 3
    assert tokenizer.decode(ids) == "日"
    assert tokenizer.decode(ids[:2]) == "\ufffd"


def test_lone_surrogates_are_named_with_their_position(tokenizer: Tokenizer) -> None:
    with pytest.raises(InvalidPrompt, match=r"U\+D83D.*character 4"):
        tokenizer.encode("abc\ud83d")


def test_very_long_words_are_no_trouble(tokenizer: Tokenizer) -> None:
    for text in ("a" * 300_000, " " * 300_000 + "x", "1" * 300_000, "\n " * 100_000, "e" + "\u0301" * 50_000):
        assert tokenizer.decode(tokenizer.encode(text)) == unicodedata.normalize("NFC", text)


Change = Callable[[dict[str, Any]], object]

OTHER_KINDS: dict[str, Change] = {
    "normalizer is not NFC": lambda root: root.update(normalizer={"type": "NFKC"}),
    "normalizer is not NFC ": lambda root: root.update(normalizer={"type": "Sequence", "normalizers": [{"type": "Lowercase"}]}),
    "split pattern": lambda root: root["pre_tokenizer"]["pretokenizers"][0].update(pattern={"Regex": r"\p{N}{1,3}"}),
    "split pattern ": lambda root: root["pre_tokenizer"]["pretokenizers"][0].update(pattern={"String": " "}),
    "isolate": lambda root: root["pre_tokenizer"]["pretokenizers"][0].update(behavior="Removed"),
    "isolate ": lambda root: root["pre_tokenizer"]["pretokenizers"][0].update(invert=True),
    "adds a space": lambda root: root["pre_tokenizer"]["pretokenizers"][1].update(add_prefix_space=True),
    "followed by ByteLevel": lambda root: root["pre_tokenizer"]["pretokenizers"].reverse() or root["pre_tokenizer"]["pretokenizers"].pop(),
    "a split followed": lambda root: root.update(pre_tokenizer={"type": "Metaspace"}),
    "not BPE": lambda root: root["model"].update(type="Unigram"),
    "byte_fallback": lambda root: root["model"].update(byte_fallback=True),
    "ignore_merges": lambda root: root["model"].update(ignore_merges=True),
    "dropout": lambda root: root["model"].update(dropout=0.1),
}


@pytest.mark.parametrize("difference", OTHER_KINDS)
def test_other_kinds_of_tokenizer_are_refused_by_what_differs(tmp_path: Path, difference: str) -> None:
    content = small_json()
    OTHER_KINDS[difference](content)
    with pytest.raises(UnsupportedModel, match=difference.strip()):
        from_json(tmp_path, content)


DAMAGES: dict[str, Change] = {
    "no vocab": lambda root: root["model"].pop("vocab"),
    "empty vocab": lambda root: root["model"].update(vocab={}),
    "ids as text": lambda root: root["model"]["vocab"].update(a="1"),
    "ids as truth values": lambda root: root["model"]["vocab"].update(a=True),
    "ids below zero": lambda root: root["model"]["vocab"].update(a=-1),
    "a huge id": lambda root: root["model"]["vocab"].update(a=2**31),
    "an id twice": lambda root: root["model"]["vocab"].update(a=1),
    "a byte missing": lambda root: root["model"]["vocab"].pop("Ġ"),
    "not in the byte alphabet": lambda root: root["model"]["vocab"].update({"日": 600}),
    "an empty token": lambda root: root["model"]["vocab"].update({"": 600}),
    "no merges": lambda root: root["model"].pop("merges"),
    "a merge of three": lambda root: root["model"]["merges"].append("a b c"),
    "a merge of numbers": lambda root: root["model"]["merges"].append([1, 2]),
    "a merge that is a number": lambda root: root["model"]["merges"].append(7),
    "a merge without result": lambda root: root["model"]["merges"].append(["x", "y"]),
    "a merge of surrogates": lambda root: root["model"]["merges"].append(["\ud800", "y"]),
    "added tokens no list": lambda root: root.update(added_tokens={}),
    "an added token no object": lambda root: root["added_tokens"].append(7),
    "an added id no number": lambda root: root["added_tokens"][0].update(id="7"),
    "an added id of a base token": lambda root: root["added_tokens"][0].update(id=7),
    "an added id twice": lambda root: root["added_tokens"].append(root["added_tokens"][0]),
    "a huge added id": lambda root: root["added_tokens"][0].update(id=2**40),
    "an added text twice": lambda root: root["added_tokens"][0].update(content=TOOL),
    "an added surrogate": lambda root: root["added_tokens"][0].update(content="\udfff"),
    "an empty added token": lambda root: root["added_tokens"][0].update(content=""),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_files_are_refused_by_name(tmp_path: Path, damage: str) -> None:
    content = small_json()
    DAMAGES[damage](content)
    with pytest.raises(BadFile, match=r"tokenizer\.json"):
        from_json(tmp_path, content)


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"<!doctype html>",
        b"version https://git-lfs.github.com/spec/v1\n",
        b"[]",
        b"null",
        b"[" * 200_000,
        b"\xff\xfe",
        b'{"a":' + b"9" * 5000 + b"}",
    ],
    ids=range(8),
)
def test_files_that_are_no_tokenizer(tmp_path: Path, raw: bytes) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_bytes(raw)
    with pytest.raises(BadFile, match=r"tokenizer\.json"):
        Tokenizer.from_json(path)


def test_a_missing_and_a_monstrous_file(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    with pytest.raises(BadFile, match="cannot be read"):
        Tokenizer.from_json(path)
    with path.open("wb") as file:
        file.truncate(33_000_000)
    with pytest.raises(BadFile, match="larger than 32 MB"):
        Tokenizer.from_json(path)


@pytest.mark.parametrize("member", ['"x": NaN', '"model": {}'])
def test_a_number_that_is_none_and_a_key_twice(tmp_path: Path, member: str) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text(f"{{{member}, {json.dumps(small_json())[1:]}")
    with pytest.raises(BadFile, match="no valid JSON"):
        Tokenizer.from_json(path)


def test_a_pipe_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "tokenizer.json")
    with pytest.raises(BadFile, match="no plain file"):
        Tokenizer.from_json(tmp_path / "tokenizer.json")


def test_a_small_file_takes_little_memory(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(small_json()))
    tracemalloc.start()
    read_tokenizer_json(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2_000_000


@pytest.mark.parametrize("normalizer", [None, {"type": "Sequence", "normalizers": []}])
def test_without_a_normalizer_text_is_taken_as_it_is(tmp_path: Path, normalizer: object) -> None:
    composing = from_json(tmp_path, small_json())
    literal = from_json(tmp_path, small_json() | {"normalizer": normalizer})
    assert composing.decode(composing.encode("e\u0301")) == "é"
    assert literal.decode(literal.encode("e\u0301")) == "e\u0301"


def test_the_name_of_a_gguf_s_pattern_says_whether_text_is_composed() -> None:
    literal = Tokenizer.from_gguf(small_gguf() | {"tokenizer.ggml.pre": "deepseek-r1-qwen"})
    assert literal.decode(literal.encode("e\u0301")) == "e\u0301"
    assert GGUF.decode(GGUF.encode("e\u0301")) == "é"


@pytest.mark.parametrize("pre", [None, "default"])
def test_a_nameless_gguf_is_qwen2_s_only_with_its_vocabulary(monkeypatch: pytest.MonkeyPatch, pre: str | None) -> None:
    keys = small_gguf() | {"tokenizer.ggml.pre": pre}
    if pre is None:
        del keys["tokenizer.ggml.pre"]
    with pytest.raises(UnsupportedModel, match=r"tokenizer\.ggml\.pre"):
        Tokenizer.from_gguf(keys)
    monkeypatch.setattr(vocabulary, "_QWEN2_SIZES", (len(BASE), len(MERGES)))
    assert Tokenizer.from_gguf(keys).encode("hello é") == GGUF.encode("hello é")


def test_a_merge_cannot_make_a_control_token(tmp_path: Path) -> None:
    # The mark is repeated among the base tokens, as some writers do, and a merge leads to it: refused, not encoded.
    content = small_json()
    content["added_tokens"][0]["content"] = "xy"
    content["model"]["vocab"]["xy"] = content["added_tokens"][0]["id"]
    assert max(from_json(tmp_path, content).encode("xyxy")) < len(BASE)
    content["model"]["merges"].append(["x", "y"])
    with pytest.raises(BadFile, match="merges"):
        from_json(tmp_path, content)


def test_the_chatml_marks_are_control_tokens_whatever_the_file_says(tmp_path: Path) -> None:
    content = small_json()
    for entry in content["added_tokens"]:
        entry["special"] = False
    assert from_json(tmp_path, content).special == CONTROL
    keys = small_gguf()
    keys["tokenizer.ggml.token_type"] = [1 if kind == 3 else kind for kind in keys["tokenizer.ggml.token_type"]]
    assert Tokenizer.from_gguf(keys).special == CONTROL


@pytest.mark.parametrize(
    ("key", "value", "error"),
    [
        ("model", "llama", UnsupportedModel),
        ("model", None, UnsupportedModel),
        ("pre", "llama-bpe", UnsupportedModel),
        ("pre", ["qwen2"], UnsupportedModel),
        ("tokens", None, BadFile),
        ("tokens", "abc", BadFile),
        ("tokens", [1] * (SIZE + 4), BadFile),
        ("token_type", None, BadFile),
        ("token_type", [1], BadFile),
        ("token_type", [6] * (SIZE + 4), UnsupportedModel),
        ("merges", None, BadFile),
        ("merges", ["abc"], BadFile),
        ("tokens", ["a"] * (SIZE + 4), BadFile),
    ],
)
def test_bad_gguf_keys_are_refused(key: str, value: object, error: type[BadFile]) -> None:
    with pytest.raises(error, match=r"m\.gguf"):
        Tokenizer.from_gguf(small_gguf() | {f"tokenizer.ggml.{key}": value}, "m.gguf")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@given(st.sampled_from(["added_tokens", "normalizer", "pre_tokenizer", "model", "vocab", "merges", "entry"]), JSON)
def test_any_other_value_is_an_error_of_ours_or_harmless(tmp_path_factory: pytest.TempPathFactory, name: str, value: object) -> None:
    content = small_json()
    if name in ("vocab", "merges"):
        content["model"][name] = value
    elif name == "entry":
        content["added_tokens"].append(value)
    else:
        content[name] = value
    try:
        tokenizer = from_json(tmp_path_factory.getbasetemp(), content)
    except BadFile:
        return
    assert tokenizer.decode(tokenizer.encode("hello")) == "hello"
