"""Random JSON schemas, and a model of random logits that writes in their form."""

from __future__ import annotations

import numpy as np
from hypothesis import strategies as st

from qwen2_local.backends.base import Choice
from qwen2_local.grammar import Constraint
from qwen2_local.sampling import choose
from qwen2_local.tokens import Tokenizer

NAMES = st.sampled_from(["a", "b", "name", "größe", "x y", 'quo"te', "back\\slash", "a/b", "line\nbreak", "日本", "~", "$ref", "type"])
SCALARS = st.none() | st.booleans() | st.integers(-1000, 1000) | st.sampled_from([0.5, -2.25, 1e10]) | st.text('ab"\\/é\n日 {}', max_size=5)
VALUES = st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=3), max_leaves=5)
PATTERNS = st.sampled_from(["^[a-z]{2,4}$", "[0-9]{3}", "^(yes|no)$", "^x", "a.c$", "^\\d{4}-\\d{2}$", '^[^"\\\\]+$', "é|ü", "^$"])
FORMATS = st.sampled_from(["date", "date-time", "time", "uuid", "ipv4", "ipv6", "email", "hostname", "uri", "password", "nonsense"])


def _some(**parts: st.SearchStrategy):
    """A mapping with any of these parts."""
    return st.fixed_dictionaries({}, optional=parts)


def _typed(kind: str, **parts: st.SearchStrategy):
    return _some(**parts).map(lambda rest: {"type": kind, **rest})


_integers, _numbers, _counts = st.integers(-100, 100), st.integers(-100, 100) | st.sampled_from([0.5, -1.25, 99.5]), st.integers(0, 4)
LEAVES = st.one_of(
    st.booleans(),
    st.just({}),
    st.sampled_from(["null", "boolean", "integer", "number", "string", "array", "object"]).map(lambda kind: {"type": kind}),
    _typed("integer", minimum=_integers, maximum=_integers, exclusiveMinimum=_integers, multipleOf=st.sampled_from([1, 2, 3, 7, 10])),
    _typed("number", minimum=_numbers, maximum=_numbers, exclusiveMaximum=_numbers, multipleOf=st.sampled_from([1, 0.5, 0.25])),
    _typed("string", minLength=_counts, maxLength=st.integers(0, 12)),
    _typed("string", pattern=PATTERNS, maxLength=st.integers(3, 12)),
    _typed("string", format=FORMATS),
    VALUES.map(lambda value: {"const": value}),
    st.lists(VALUES, max_size=4).map(lambda values: {"enum": values}),
    st.lists(st.sampled_from(["null", "boolean", "integer", "string"]), min_size=1, max_size=3, unique=True).map(lambda kinds: {"type": kinds}),
    st.just({"$ref": "#/$defs/one"}),
    st.just({"$ref": "#/$defs/two"}),
)
_REFUSED = {
    "not": {"type": "null"},
    "uniqueItems": True,
    "contains": {"type": "integer"},
    "propertyNames": {"maxLength": 2},
    "if": {"type": "string"},
    "dependentRequired": {"a": ["b"]},
    "unevaluatedProperties": False,
}


def _larger(inner: st.SearchStrategy):
    several = st.lists(inner, min_size=1, max_size=3)
    properties = st.dictionaries(NAMES, inner, max_size=4)
    return st.one_of(
        _typed("array", items=inner, minItems=_counts, maxItems=_counts, prefixItems=several),
        _typed(
            "object",
            properties=properties,
            required=st.lists(NAMES, max_size=3, unique=True),
            additionalProperties=inner,
            patternProperties=st.dictionaries(st.sampled_from(["^s_", "^n_[0-9]+$"]), inner, max_size=2),
            minProperties=_counts,
            maxProperties=_counts,
        ),
        # As people write them: all that is named is wanted.
        properties.map(lambda of: {"type": "object", "properties": of, "required": list(of), "additionalProperties": False}),
        several.map(lambda options: {"anyOf": options}),
        several.map(lambda options: {"oneOf": options}),
        several.map(lambda parts: {"allOf": parts}),
        st.tuples(inner, st.sampled_from(list(_REFUSED.items()))).map(
            lambda pair: {**(pair[0] if type(pair[0]) is dict else {}), pair[1][0]: pair[1][1]}
        ),
    )


def _with_definitions(parts: tuple[object, object, object]) -> object:
    whole, one, two = parts
    return {**whole, "$defs": {"one": one, "two": two}} if isinstance(whole, dict) else whole


SCHEMAS = st.tuples(*(st.recursive(LEAVES, _larger, max_leaves=leaves) for leaves in (8, 3, 3))).map(_with_definitions)


class Babbler:
    """A model without sense: random logits, with a growing wish to close what is open."""

    def __init__(self, tokenizer: Tokenizer, stops: frozenset[int]) -> None:
        self._tokenizer, self._stops = tokenizer, stops
        self._closing = np.array([self._closes(number) for number in range(tokenizer.size)], np.float32)

    def _closes(self, number: int) -> float:
        text = self._tokenizer.token_bytes(number)
        return 3.0 if number in self._stops or text[:1] in (b'"', b"}", b"]") else 0.0

    def write(self, constraint: Constraint, seed: int, most: int) -> tuple[str, bool]:
        """A reply of at most so many tokens; and whether it ended by itself."""
        random = np.random.default_rng(seed)
        tokens: list[int] = []
        while not constraint.ended:
            if len(tokens) == most:
                return self._tokenizer.decode(tokens), False
            logits = random.standard_normal(self._tokenizer.size, np.float32) + self._closing * (len(tokens) / 16)
            choice = Choice(self._tokenizer.size, 1.0, top_k=200, uniform=float(random.random()), mask=constraint.mask)
            token = choose(logits, choice).token
            assert token >= 0, "there is always a token that may come"
            if token in self._stops:
                break
            constraint.accept(token)
            tokens.append(token)
        return self._tokenizer.decode(tokens), True
