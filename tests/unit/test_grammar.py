"""Replies in a form: what a constraint allows, what is refused, and that nothing else comes out, whatever the model would rather say.

More schemas with `QWEN2_LOCAL_ALL_POINTS=1 python -m pytest tests/unit/test_grammar.py`.
"""

from __future__ import annotations

import gc
import json
import os
import socket
import time
import weakref
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qwen2_local import grammar
from qwen2_local.errors import BackendError, SchemaError, TruncatedReply, UnsupportedSchema
from qwen2_local.grammar import Constraint, JsonSchema, OneOf, Regex, parse
from qwen2_local.tokens import Tokenizer
from tests.support import qwen2_vocabulary
from tests.support.schemas import SCHEMAS, Babbler
from tests.support.small_tokenizer import CONTROL, SIZE, small_gguf

GUIDE = Path(grammar.__file__).parent / "guide" / "tokenizer.json"
END = CONTROL["<|im_end|>"]
RANDOM_SCHEMAS = 2000 if os.environ.get("QWEN2_LOCAL_ALL_POINTS") else 200


@pytest.fixture(scope="module")
def small() -> Tokenizer:
    return Tokenizer.from_gguf(small_gguf())


@pytest.fixture(scope="module")
def guide() -> Tokenizer:
    return Tokenizer.from_json(GUIDE)


def start(form: object, tokenizer: Tokenizer, stops: Iterable[int] = (END,), limit: int = SIZE) -> Constraint:
    return grammar.compile(grammar.spec_of(form), tokenizer, limit, frozenset(stops)).start()


def allowed(constraint: Constraint) -> set[int]:
    return set(np.flatnonzero(np.unpackbits(constraint.mask().view(np.uint8), bitorder="little")).tolist())


def take(constraint: Constraint, tokenizer: Tokenizer, text: str) -> None:
    for token in tokenizer.encode(text):
        assert token in allowed(constraint), tokenizer.describe(token)
        constraint.accept(token)


# A constraint


def test_a_mask_allows_every_token_that_may_come_and_no_other(small: Tokenizer) -> None:
    constraint = start(OneOf(("hello", "hell", "no")), small)
    assert {small.token_bytes(token) for token in allowed(constraint)} == {b"h", b"he", b"hello", b"n"}
    take(constraint, small, "he")
    assert {small.token_bytes(token) for token in allowed(constraint)} == {b"l", b"ll", b"llo"}
    assert not constraint.ended


def test_a_stop_comes_where_the_reply_may_end_and_nothing_else_where_it_must(small: Tokenizer) -> None:
    constraint = start(OneOf(("hell", "hello")), small)
    take(constraint, small, "hell")
    assert allowed(constraint) == {END, small.encode("o")[0]}
    assert not constraint.ended
    take(constraint, small, "o")
    assert allowed(constraint) == {END}
    assert constraint.ended
    constraint.accept(END)
    assert constraint.ended


def test_several_stops_may_all_come(small: Tokenizer) -> None:
    constraint = start(Regex("h"), small, CONTROL.values())
    take(constraint, small, "h")
    assert allowed(constraint) == set(CONTROL.values())


def test_without_a_stop_it_ends_where_nothing_may_follow(small: Tokenizer) -> None:
    constraint = start(Regex("h{2,3}"), small, ())
    take(constraint, small, "hh")
    assert allowed(constraint) & set(range(SIZE)) == set(small.encode("h"))
    take(constraint, small, "h")
    assert constraint.ended


def test_ids_from_the_limit_on_are_as_if_they_were_not_there(small: Tokenizer) -> None:
    merged = small.encode("hello")[0]
    constraint = start(Regex("hello"), small, (), limit=merged)
    assert allowed(constraint) <= set(range(merged))


def test_control_tokens_never_come_as_text(guide: Tokenizer) -> None:
    control = set(guide.special.values())
    free = start(Regex("(?s).*"), guide, (), guide.size)
    assert control.isdisjoint(allowed(free))
    spelled = start(Regex(r"<\|im_end\|>"), guide, (), guide.size)
    assert control.isdisjoint(allowed(spelled))
    take(spelled, guide, "<|im_end|>")
    assert spelled.ended


def test_what_was_accepted_can_be_taken_back(guide: Tokenizer) -> None:
    constraint = start({"type": "array", "items": {"type": "integer"}}, guide, (), guide.size)
    text = guide.encode("[12, 345, -6]")
    masks = []
    for token in text:
        masks.append(allowed(constraint))
        constraint.accept(token)
    assert constraint.ended
    for count in (1, 3, len(text) - 4):
        constraint.rollback(count)
        text = text[: len(text) - count]
        assert allowed(constraint) == masks[len(text)]
        assert not constraint.ended
    constraint.rollback(0)


def test_it_tells_how_many_drafts_would_do(guide: Tokenizer) -> None:
    constraint = start(Regex("[0-9]+"), guide, (), guide.size)
    one, letter = guide.encode("1")[0], guide.encode("x")[0]
    before = allowed(constraint)
    assert constraint.allowed([one, one, letter, one]) == 2
    assert constraint.allowed([letter]) == 0
    assert constraint.allowed([]) == 0
    assert allowed(constraint) == before


def test_a_wrong_token_is_an_error(guide: Tokenizer) -> None:
    constraint = start(Regex("[0-9]+"), guide, (), guide.size)
    with pytest.raises(BackendError, match="does not fit"):
        constraint.accept(guide.encode("x")[0])


@pytest.mark.parametrize("name", ["é", "e\u0301", "ﬁ", "日本", "😀", "a\u0327\u0301"])
def test_text_that_the_tokenizer_would_change_still_comes_as_it_is(guide: Tokenizer, small: Tokenizer, name: str) -> None:
    """Unicode's NFC makes one letter of two: a property spelled with two has to be written with two."""
    schema = {"type": "object", "properties": {name: {"const": 1}}, "required": [name], "additionalProperties": False}
    for tokenizer in (guide, small):
        text, whole = Babbler(tokenizer, frozenset()).write(start(schema, tokenizer, (), tokenizer.size), 1, 200)
        assert whole
        assert parse(text, schema) == {name: 1}


def test_replies_of_one_grammar_do_not_know_each_other(small: Tokenizer) -> None:
    form = grammar.compile(Regex("h+|o+"), small, SIZE, {END})
    one, other = form.start(), form.start()
    take(one, small, "hh")
    take(other, small, "oo")
    assert allowed(one) == {END, *small.encode("h")}
    assert allowed(other) == {END, *small.encode("o")}


def test_the_vocabulary_is_kept_with_its_tokenizer(small: Tokenizer, guide: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    grammar.compile(Regex("a"), small, SIZE, {END})
    monkeypatch.setattr(grammar, "_wrapped", None)
    grammar.compile(Regex("b"), small, SIZE, {END})
    with pytest.raises(TypeError):
        grammar.compile(Regex("b"), guide, guide.size, {END})


# Forms


class Twin:
    """As a pydantic model, as far as it is looked at."""

    @staticmethod
    def model_json_schema() -> dict[str, Any]:
        return {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"], "additionalProperties": False}

    @staticmethod
    def model_validate_json(text: str) -> object:
        if json.loads(text)["n"] == 13:
            raise ValueError("thirteen is out")
        return ("twin", json.loads(text)["n"])


@pytest.mark.parametrize("spec", [JsonSchema({"type": "null"}), Regex("a+"), OneOf(("a", "b"))])
def test_a_form_travels_as_json(spec: grammar.Spec) -> None:
    assert grammar.from_plain(json.loads(json.dumps(spec.plain()))) == spec
    assert grammar.spec_of(spec) is spec


def test_models_and_schemas_are_forms() -> None:
    assert grammar.spec_of(Twin) == JsonSchema(Twin.model_json_schema())
    assert grammar.spec_of({"type": "null"}) == JsonSchema({"type": "null"})
    assert grammar.spec_of(True) == JsonSchema(True)


@pytest.mark.parametrize("wrong", [None, 3, "string", [], object(), {"regex": 3}, {"choice": "ab"}, {"choice": [1]}, {}])
def test_other_things_are_none(wrong: object) -> None:
    with pytest.raises(UnsupportedSchema):
        grammar.from_plain(wrong)
    if not isinstance(wrong, dict):
        with pytest.raises(UnsupportedSchema):
            grammar.spec_of(wrong)


def test_a_reply_is_parsed_into_what_its_form_says() -> None:
    assert parse('{"n": 5}', Twin) == ("twin", 5)
    assert parse('{"n": 5}', Twin.model_json_schema()) == {"n": 5}
    assert parse("[1.5, null]", True) == [1.5, None]
    assert parse("aab", Regex("a+b")) == "aab"
    assert parse("b", OneOf(("a", "b"))) == "b"


def test_a_real_pydantic_model() -> None:
    pydantic = pytest.importorskip("pydantic")
    from decimal import Decimal

    line = pydantic.create_model("Line", what=(str, ...), price=(Decimal, ...), file=(Path, ...))
    invoice = pydantic.create_model("Invoice", number=(int, pydantic.Field(ge=1)), lines=(list[line], ...), note=(str | None, None))
    reply = parse('{"number": 3, "lines": [{"what": "tea", "price": 2.5, "file": "a.txt"}]}', invoice)
    assert reply == invoice(number=3, lines=[line(what="tea", price=Decimal("2.5"), file=Path("a.txt"))])
    with pytest.raises(SchemaError):
        parse('{"number": 0, "lines": []}', invoice)


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("", TruncatedReply),
        ('{"n": 1', TruncatedReply),
        ('{"n"', TruncatedReply),
        ('{"n": x}', SchemaError),
        ('{"n": 1} ', SchemaError),
        ('{"n": "1"}', SchemaError),
        ("{}", SchemaError),
        ('{"n": 1, "n": 2}', SchemaError),
        ('{"n": ' + "9" * 5000 + "}", SchemaError),
        ('{"n": 13}', SchemaError),
        ("\ud800", SchemaError),
    ],
)
def test_what_is_not_in_the_form_is_a_typed_error(text: str, kind: type[SchemaError]) -> None:
    with pytest.raises(SchemaError) as caught:
        parse(text, Twin)
    assert type(caught.value) is kind
    assert caught.value.hint


@pytest.mark.parametrize("text", ['{"a": 1, "a": 2}', '[{"b": [], "b": []}]', "1e999", "-1e400", "[" * 100_000 + "]" * 100_000])
def test_json_that_python_would_read_otherwise_is_no_reply(text: str) -> None:
    with pytest.raises(SchemaError):
        parse(text, True)


def test_a_number_that_is_rounded_out_of_its_bounds_is_no_reply() -> None:
    below = {"type": "object", "properties": {"share": {"type": "number", "exclusiveMaximum": 1}}, "required": ["share"]}
    assert parse('{"share": 0.3333333333333333333333}', below) == {"share": 1 / 3}
    with pytest.raises(SchemaError, match="digits"):
        parse('{"share": 0.99999999999999999999}', below)


def test_a_limit_may_cut_a_number_short_without_a_trace() -> None:
    """12 may be the beginning of 123: only a reply that ended by itself, or could not go on, is whole."""
    assert parse("12", {"type": "integer"}) == 12
    with pytest.raises(TruncatedReply):
        parse("12", {"type": "integer"}, whole=False)
    assert parse("[12]", {"type": "array"}, whole=False) == [12]


# Any schema


def test_any_schema_gives_a_valid_object_or_a_typed_error(guide: Tokenizer) -> None:
    babbler = Babbler(guide, frozenset({guide.special["<|im_end|>"]}))
    outcomes: Counter[str] = Counter()

    @settings(max_examples=RANDOM_SCHEMAS, deadline=None, suppress_health_check=list(HealthCheck), database=None)
    @given(SCHEMAS, st.integers(0, 2**32))
    def check(schema: Any, seed: int) -> None:
        outcomes[_outcome(schema, guide, babbler, seed, 120)] += 1

    check()
    assert outcomes["valid"] >= RANDOM_SCHEMAS * 0.25, outcomes
    assert outcomes["refused"] >= RANDOM_SCHEMAS * 0.02, outcomes


def test_any_schema_with_the_vocabulary_of_qwen2(tmp_path: Path) -> None:
    if qwen2_vocabulary.vocabulary_file() is None:
        pytest.skip("needs dashscope's vocabulary")
    qwen2_vocabulary.write_real_tokenizer(tmp_path)
    tokenizer = Tokenizer.from_json(tmp_path / "tokenizer.json")
    babbler = Babbler(tokenizer, frozenset({tokenizer.special["<|im_end|>"]}))
    outcomes: Counter[str] = Counter()

    @settings(max_examples=15, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck), database=None)
    @given(SCHEMAS, st.integers(0, 2**32))
    def check(schema: Any, seed: int) -> None:
        outcomes[_outcome(schema, tokenizer, babbler, seed, 100)] += 1

    check()
    assert outcomes["valid"] >= 1, outcomes


def _outcome(schema: Any, tokenizer: Tokenizer, babbler: Babbler, seed: int, most: int) -> str:
    try:
        constraint = start(schema, tokenizer, [tokenizer.special["<|im_end|>"]], tokenizer.size)
        text, whole = babbler.write(constraint, seed, most)
    except UnsupportedSchema:
        return "refused"
    try:
        value = parse(text, schema, whole=whole)
    except TruncatedReply:
        assert not whole
        return "truncated"
    except SchemaError:
        return "no reply"
    try:
        jsonschema.Draft202012Validator(schema).validate(value)
    except RecursionError:
        return "no meaning"  # a definition that refers to itself at once: the standard leaves it open, the judge goes round for ever
    return "valid"


# Hostile ones


def deep(depth: int) -> object:
    schema: object = {"type": "string"}
    for _ in range(depth):
        schema = {"type": "array", "items": schema}
    return schema


def forks(count: int) -> object:
    """Everything of everything: 3^count combinations."""
    return {
        "allOf": [{"anyOf": [{"properties": {f"{i}{j}": {}}, "required": [f"{i}{j}"], "type": "object"} for j in range(3)]} for i in range(count)]
    }


def chain(count: int) -> object:
    """Two references each to the next: 2^count paths."""
    definitions: dict[str, object] = {
        f"d{i}": {"allOf": [{"anyOf": [{"$ref": f"#/$defs/d{i + 1}"}, {"minLength": i}]}, {"$ref": f"#/$defs/d{i + 1}"}]} for i in range(count)
    }
    return {"$defs": {**definitions, f"d{count}": {"type": "string"}}, "$ref": "#/$defs/d0"}


circle: dict[str, Any] = {"type": "array"}
circle["items"] = circle


@pytest.mark.parametrize(
    "schema",
    [
        *(deep(101), deep(5000), deep(100_000), forks(12), forks(30), chain(12), chain(60), circle),
        {"enum": [f"value {number}" for number in range(100_000)]},
        {"type": "object", "properties": {f"p{number}": {"type": "string"} for number in range(20_000)}},
        {"description": "x" * (2 << 20)},
        *({"$ref": "#"}, {"allOf": [{"$ref": "#"}, {"type": "object"}]}, {"$ref": "#/nowhere"}, {"$ref": "http://example.com/x"}, {"$ref": 3}),
        *({"not": {}}, {"type": "array", "uniqueItems": True}, {"if": {}, "then": {}}, {"propertyNames": {"pattern": "a"}}, {"$dynamicRef": "#x"}),
        *(False, {"enum": []}, {"type": "string", "minLength": 3, "maxLength": 2}, {"type": "nothing"}, {"type": "string", "format": "regex"}),
        *({"type": "string", "pattern": "("}, {"type": "string", "pattern": "(?=a)b"}, {"type": "string", "pattern": r"(a)\1"}),
        *({"type": 3}, {"properties": []}, {"anyOf": {}}, {"required": "a"}, {"minItems": "x"}, {"multipleOf": 0}, {"multipleOf": 1e-300}),
        *(
            {"const": float("nan")},
            {"minimum": float("inf")},
            {"const": {1: 2}},
            {"const": {1, 2}},
            {"const": b""},
            {"const": "\ud800"},
            {"enum": ["\x00"]},
        ),
        {"x-guidance": {"lenient": True}, "not": {"type": "string"}},
        {"oneOf": [{"type": "string"}, {"type": "string", "minLength": 2}]},
    ],
    ids=lambda schema: repr(schema)[:40] if len(str(type(schema))) and not isinstance(schema, dict) else "+".join(map(str, schema))[:40],
)
def test_schemas_that_cannot_be_kept_to_are_refused_at_once(schema: object, small: Tokenizer) -> None:
    started = time.perf_counter()
    with pytest.raises(UnsupportedSchema) as caught:
        start(JsonSchema(schema), small)
    assert time.perf_counter() - started < 5
    assert caught.value.hint
    assert len(caught.value.what) < 400
    assert "\n" not in caught.value.what


@pytest.mark.parametrize("spec", [Regex("("), Regex("(?=a)b"), Regex(r"\bfoo"), Regex("a" * 100_000), Regex("\ud800"), Regex("[^\\s\\S]")])
def test_regular_expressions_that_cannot_be_kept_to_are_refused(spec: Regex, small: Tokenizer) -> None:
    with pytest.raises(UnsupportedSchema, match=r"regular expression|U\+D800"):
        start(spec, small)


@pytest.mark.parametrize("options", [(), ("\ud800",), ("\x00",), ("a",) * 5000, ("a" * (1 << 19),)])
def test_choices_that_are_none_are_refused(options: tuple[str, ...], small: Tokenizer) -> None:
    with pytest.raises(UnsupportedSchema):
        start(OneOf(options), small)


@pytest.mark.parametrize("option", ["a", " a ", "/x/i", '"', "\\n", "\n", "é", "e\u0301", "😀", "a | b", "%ignore", "# no"])
def test_a_choice_means_its_letters(option: str, small: Tokenizer) -> None:
    constraint = start(OneOf((option, "something else")), small)
    for byte in option.encode():
        token = next(number for number in range(SIZE) if small.token_bytes(number) == bytes([byte]))
        assert constraint.allowed([token]) == 1
        constraint.accept(token)
    assert END in allowed(constraint)
    assert parse(option, OneOf((option, "x"))) == option


def test_a_pattern_whose_states_explode_is_slow_for_nobody(small: Tokenizer) -> None:
    constraint = start(Regex("(a|b)*a(a|b){200}c"), small)
    random = np.random.default_rng(1)
    try:
        for _ in range(400):
            started = time.perf_counter()
            options = sorted(allowed(constraint))
            assert time.perf_counter() - started < 1
            constraint.accept(int(random.choice(options)))
    except UnsupportedSchema as error:
        assert "regular expression" in error.what


def test_no_reference_is_fetched(small: Tokenizer, tmp_path: Path) -> None:
    secret = tmp_path / "schema.json"
    secret.write_text('{"type": "null"}')
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.2)
        address = f"http://127.0.0.1:{server.getsockname()[1]}/schema.json"
        for schema in (
            {"$ref": address},
            {"$schema": address},
            {"$id": address, "$ref": "other.json"},
            {"$ref": secret.as_uri()},
            {"$ref": str(secret)},
        ):
            with pytest.raises(UnsupportedSchema):
                start(schema, small)
        with pytest.raises(TimeoutError):
            server.accept()


def test_a_property_cannot_be_spelled_past_its_schema(guide: Tokenizer) -> None:
    r"""JSON may write "a" as "\u0061": a grammar that looks at the letters would take it for another property."""
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    for text in (r'{"\u0061": "x"}', r'{"\u0041": "x"}'):
        with pytest.raises(SchemaError):
            parse(text, schema)


def test_whitespace_comes_to_an_end(guide: Tokenizer) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "array"}}, "required": ["a"]}
    for text in ('{"a":[]}', '{"a": []}', '{\n  "a": [\n    1,\n    2\n  ]\n}'):
        assert parse(text, schema)
    for text in ('{  "a": []}', '{\n\n"a": []}', "{" + "\n" + " " * 50 + '"a": []}', '{"a": []}\n'):
        with pytest.raises(SchemaError):
            parse(text, schema)


def test_a_tokenizer_that_nobody_uses_is_let_go_with_its_vocabulary() -> None:
    tokenizer = Tokenizer.from_gguf(small_gguf())
    there = weakref.ref(tokenizer)
    made = grammar.compile(Regex("abc"), tokenizer, SIZE, {END})
    made.start().mask()
    del tokenizer
    gc.collect()
    assert there() is None
    assert made.start().mask().any(), "what is under way goes on"


def test_an_object_has_no_properties_but_those_named() -> None:
    named = {"type": "object", "properties": {"name": {"type": "string"}}, "required": ["name"]}
    assert grammar.parse('{"name": "Mun"}', named) == {"name": "Mun"}
    with pytest.raises(SchemaError):
        grammar.parse('{"name": "Mun", "length": 673}', named)
    for inner in ({"items": named}, {"$defs": {"River": named}, "items": {"$ref": "#/$defs/River"}}):
        with pytest.raises(SchemaError):
            grammar.parse('[{"name": "Mun", "length": 673}]', {"type": "array", **inner})


@pytest.mark.parametrize(
    "open_one",
    [
        {"type": "object", "properties": {"name": {"type": "string"}}, "additionalProperties": True},
        {"type": "object", "properties": {"name": {"type": "string"}}, "additionalProperties": {"type": "integer"}},
        {"allOf": [{"properties": {"name": {"type": "string"}}}, {"properties": {"length": {"type": "integer"}}}], "type": "object"},
    ],
)
def test_others_are_allowed_where_the_schema_speaks_of_them(open_one: dict[str, Any]) -> None:
    assert grammar.parse('{"name": "Mun", "length": 673}', open_one) == {"name": "Mun", "length": 673}
