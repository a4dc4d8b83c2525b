"""Replies that keep to a form: a JSON schema, a regular expression, one of some texts.

`compile` makes a `Grammar` for a tokenizer; its `start` gives a `Constraint`, which says before each token of one reply which ids may come.
`parse` reads the finished reply. Parsing and masks are llguidance's (MIT), which bounds the work a hostile grammar makes; here are the bounds
on what it is given, its errors in our words, and what its grammars leave open. No reference in a schema is ever fetched.
"""

from __future__ import annotations

import functools
import json
import math
import os
import re
import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast
from weakref import WeakKeyDictionary, ref

import numpy as np

from qwen2_local.backends.base import Mask
from qwen2_local.errors import BackendError, SchemaError, TruncatedReply, UnsupportedSchema
from qwen2_local.tokens import Tokenizer

if TYPE_CHECKING:
    import llguidance

_MOST_SCHEMA = 1 << 20
_MOST_NODES = 50_000
_MOST_DEPTH = 100
_MOST_REGEX = 1 << 14
_MOST_OPTIONS = 4096
_MOST_OPTION_BYTES = 1 << 18


@dataclass(frozen=True, slots=True)
class JsonSchema:
    """JSON text that a schema (drafts 4 to 2020-12) allows, properties in the schema's order. schema: a mapping of plain JSON, or a bool.

    A subset, as llguidance has it: `not`, `if`, `uniqueItems`, `contains`, `propertyNames` and overlapping `oneOf` are refused, never ignored.
    """

    schema: Any

    def plain(self) -> dict[str, object]:
        """As JSON; `from_plain` reads it."""
        return {"schema": self.schema}


@dataclass(frozen=True, slots=True)
class Regex:
    """Text that a regular expression matches as a whole. Rust's syntax, without look-around and back-references."""

    pattern: str

    def plain(self) -> dict[str, object]:
        """As JSON; `from_plain` reads it."""
        return {"regex": self.pattern}


@dataclass(frozen=True, slots=True)
class OneOf:
    """One of these texts."""

    options: tuple[str, ...]

    def plain(self) -> dict[str, object]:
        """As JSON; `from_plain` reads it."""
        return {"choice": list(self.options)}


Spec = JsonSchema | Regex | OneOf


def from_plain(value: object) -> Spec:
    """The reverse of `plain`. Raises UnsupportedSchema for anything else."""
    match value:
        case {"schema": schema}:
            return JsonSchema(schema)
        case {"regex": str(pattern)}:
            return Regex(pattern)
        case {"choice": [*options]} if all(isinstance(option, str) for option in options):
            return OneOf(tuple(options))
    raise UnsupportedSchema("This is no form for a reply.", hint=_FORMS)


def spec_of(form: object) -> Spec:
    """A form as a caller gives it: one of the above, a JSON schema as a mapping or a bool, or a pydantic model (a class with
    `model_json_schema`). Raises UnsupportedSchema for anything else.
    """
    if isinstance(form, Spec):
        return form
    if isinstance(form, (Mapping, bool)):
        return JsonSchema(form)
    if callable(schema := getattr(form, "model_json_schema", None)):
        return JsonSchema(schema())
    raise UnsupportedSchema(f"A {type(form).__name__} is no form for a reply.", hint=_FORMS)


_FORMS = "Give a JSON schema, a pydantic model, a regular expression or choices."


class Constraint:
    """What may come next in one reply. Used by one thread; masks are computed on another while the model runs."""

    def __init__(self, matcher: llguidance.LLMatcher, spec: Spec) -> None:
        """Prefer `Grammar.start`."""
        self.spec = spec
        self.ended = matcher.is_stopped()
        """May nothing but a stop follow?"""
        self._matcher = matcher
        self._ahead: Future[Mask] | None = None
        self._look_ahead()

    def mask(self) -> Mask:
        """Which ids may come next, stops among them where the reply may end. Raises UnsupportedSchema if the grammar has grown too complex."""
        if self._ahead is None:
            self._look_ahead()
        assert self._ahead is not None
        return self._ahead.result()

    def accept(self, token: int) -> None:
        """The next token. Raises BackendError for one that the mask does not allow."""
        self._settle()
        self._ahead = None
        if not self._matcher.consume_token(token):
            if "TooComplex" in self._matcher.stop_reason():
                _require_sound(self._matcher, self.spec)
            raise BackendError(f"The token {token} does not fit the form of the reply.", hint="This is a fault of the program: please report it.")
        self.ended = self._matcher.is_stopped()
        if not self.ended:
            self._look_ahead()

    def rollback(self, count: int) -> None:
        """Take the last `count` accepted tokens back."""
        self._settle()
        self._ahead = None
        if count and not self._matcher.rollback(count):
            _require_sound(self._matcher, self.spec)
        self.ended = self._matcher.is_stopped()

    def allowed(self, tokens: Sequence[int]) -> int:
        """How many of these tokens could be accepted, one after the other."""
        self._settle()
        return self._matcher.validate_tokens(list(tokens))

    def _look_ahead(self) -> None:
        self._ahead = _helper(os.getpid()).submit(_mask, self._matcher, self.spec)

    def _settle(self) -> None:
        """Wait until the other thread has done with the matcher."""
        if self._ahead is not None:
            self._ahead.exception()


class Grammar:
    """A form, ready for replies in one vocabulary."""

    def __init__(self, spec: Spec, matcher: llguidance.LLMatcher) -> None:
        """Prefer `compile`."""
        self.spec = spec
        self._matcher = matcher

    def start(self) -> Constraint:
        """For a new reply."""
        return Constraint(self._matcher.deep_copy(), self.spec)


def compile(spec: Spec, tokenizer: Tokenizer, limit: int, stops: Collection[int]) -> Grammar:
    """A grammar for replies in a tokenizer's ids below `limit`; `stops`: ids that end a reply.

    The first one for a tokenizer takes about a second for Qwen2's vocabulary, later ones milliseconds. Raises UnsupportedSchema.
    """
    return Grammar(spec, _matcher(spec, _vocabulary(tokenizer, limit, frozenset(stops))))


def parse(text: str, form: object, *, whole: bool = True) -> Any:
    """The value of a reply: JSON's for a schema, an instance for a pydantic model, else the text itself.

    whole: the reply ended by itself, and not by a limit or a cancel. Raises TruncatedReply for a beginning of what the form allows, SchemaError
    for what it does not allow (also where the model has validators of its own), UnsupportedSchema.
    """
    spec = spec_of(form)
    matcher = _matcher(spec, _bytes_vocabulary())
    data = text.encode(errors="surrogatepass")
    fitting = matcher.try_consume_tokens(list(data))
    if fitting < len(data):
        about = data[max(0, fitting - 20) : fitting + 20].decode(errors="replace")
        raise SchemaError(f"The reply does not keep to its form, at {about!r}.", hint=_AGAIN)
    if not (matcher.is_accepting() if whole else matcher.is_stopped()):
        raise TruncatedReply(
            f"The reply ends after {len(text):,} characters, before it is whole.", hint="Allow more tokens (--max-tokens, --context)."
        )
    if not isinstance(spec, JsonSchema):
        return text
    try:
        value = json.loads(text, object_pairs_hook=_object, parse_float=_float)
        if _LONG_NUMBER.search(text) and not _fits(spec, json.dumps(value, ensure_ascii=False)):
            raise ValueError("a number has more digits than are kept, and is out of bounds without them")
        return value if (validate := getattr(form, "model_validate_json", None)) is None else validate(text)
    except RecursionError as error:
        raise SchemaError("The reply is nested too deeply.", hint=_AGAIN) from error
    except ValueError as error:  # also what pydantic raises
        raise SchemaError(f"The reply is not valid: {' '.join(str(error).split())[:500]}.", hint=_AGAIN) from error


_AGAIN = "Ask again, with another seed or a clearer question."


def _object(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """An object of JSON. A grammar cannot tell that a key comes twice."""
    value = dict(pairs)
    if len(value) < len(pairs):
        raise ValueError("an object has a key twice")
    return value


_LONG_NUMBER = re.compile(r"[\d.]{17}")
"""Up to 15 digits a float keeps its place among others; 0.99999999999999999 is 1."""


def _fits(spec: Spec, text: str) -> bool:
    matcher = _matcher(spec, _bytes_vocabulary())
    data = list(text.encode())
    return matcher.try_consume_tokens(data) == len(data) and matcher.is_accepting()


def _float(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise ValueError(f"the number {digits[:40]} is too large")
    return value


# llguidance


@functools.cache
def _helper(process: int) -> ThreadPoolExecutor:
    """The thread that computes masks: one, as a mask takes a tenth of a millisecond. A fork has none of its parent's."""
    return ThreadPoolExecutor(1, f"qwen2-local masks of {process}")


def _mask(matcher: llguidance.LLMatcher, spec: Spec) -> Mask:
    bits = matcher.compute_bitmask()
    _require_sound(matcher, spec)
    return np.frombuffer(bits, np.uint32)


def _matcher(spec: Spec, vocabulary: llguidance.LLTokenizer) -> llguidance.LLMatcher:
    import llguidance

    # The library's own bounds on time, less memory: a state of the lexer takes up to 2 kB.
    limits = llguidance.LLParserLimits(max_lexer_states=50_000, verbose_errors=False)
    matcher = llguidance.LLMatcher(vocabulary, _source(spec), log_level=0, limits=limits)
    _require_sound(matcher, spec)
    if not any(_mask(matcher, spec)):
        raise UnsupportedSchema(f"{_name(spec)} allows no text at all.", hint=_FORMS)
    return matcher


def _require_sound(matcher: llguidance.LLMatcher, spec: Spec) -> None:
    if matcher.is_error():
        said = " ".join(matcher.get_error().split())
        raise UnsupportedSchema(f"{_name(spec)} cannot be kept to: {said[:200]}", hint=_SIMPLER)


_SIMPLER = "Simplify it, or leave out what is named; a part that is left out can be checked afterwards."


def _name(spec: Spec) -> str:
    return {JsonSchema: "The JSON schema", Regex: "The regular expression", OneOf: "The choice"}[type(spec)]


def _source(spec: Spec) -> str:
    """In llguidance's language. Raises UnsupportedSchema for what is out of bounds."""
    from llguidance import LLMatcher

    match spec:
        case JsonSchema(schema):
            try:
                text = json.dumps(_checked(schema), allow_nan=False)
            except ValueError as error:
                raise UnsupportedSchema(f"The schema is no JSON: {error}.", hint=_FORMS) from error
            if len(text) > _MOST_SCHEMA:
                raise _too_large(spec)
            return LLMatcher.grammar_from_json_schema(text, overrides=_JSON)
        case Regex(pattern):
            if len(pattern) > _MOST_REGEX:
                raise _too_large(spec)
            return LLMatcher.grammar_from_regex(_text(pattern))
        case OneOf(options):
            if not options:
                raise UnsupportedSchema("There is nothing to choose from.", hint=_FORMS)
            if len(options) > _MOST_OPTIONS or sum(map(len, options)) > _MOST_OPTION_BYTES:
                raise _too_large(spec)
            return LLMatcher.grammar_from_lark("start: " + " | ".join(json.dumps(_text(option), ensure_ascii=False) for option in options))


_JSON: Any = {
    # One space, or a new line with its indentation: a model that may write any whitespace can go on with it for ever.
    "whitespace_flexible": True,
    "whitespace_pattern": r" |\n {0,20}",
    "item_separator": ",",
    "key_separator": ":",
    "coerce_one_of": False,
    "lenient": False,
    # No \u: a property could be written in two ways, one of them past its own schema.
    "json_allowed_escapes": 'nrbtf\\"',
    "json_allow_general_unicode_escapes": False,
}
_NEVER = re.compile(r"[\x00-\x07\x0b\x0e-\x1f\x7f\ud800-\udfff]")
"""Lone surrogates, and control characters that JSON has no short escape for."""

_NOTES = frozenset({"password", "binary", "byte", "path", "file-path", "directory-path"})
"""Formats that ask nothing of the text."""


def _too_large(spec: Spec) -> UnsupportedSchema:
    return UnsupportedSchema(f"{_name(spec)} is too large.", hint=_SIMPLER)


def _text(text: str) -> str:
    """`text` itself. Raises UnsupportedSchema for what no reply holds, or can be escaped in one way only."""
    if found := _NEVER.search(text):
        raise UnsupportedSchema(f"The form holds a character that replies cannot have (U+{ord(found[0]):04X}).", hint=_SIMPLER)
    return text


def _checked(schema: object) -> object:
    """A copy of a schema that holds plain JSON of bounded size. Raises UnsupportedSchema.

    An object with named properties has no others unless the schema speaks of them: a small model would invent keys until the context is full.
    """
    left = _MOST_NODES
    joined = False

    def copy(value: object, depth: int, data: bool) -> object:
        """data: within `const` and the like, where a key is no keyword."""
        nonlocal left, joined
        left -= 1
        if left < 0 or depth > _MOST_DEPTH:
            raise UnsupportedSchema("The JSON schema is too large, or nested too deeply.", hint=_SIMPLER)
        if isinstance(value, str):
            return _text(value)
        if value is None or isinstance(value, (bool, int, float)):
            return value
        if isinstance(value, Mapping):
            result = {}
            joined = joined or (not data and "properties" in value and not _OTHERS.isdisjoint(value))
            for key, inner in value.items():
                if not isinstance(key, str):
                    raise UnsupportedSchema(f"The JSON schema has a key that is no text: {key!r}.", hint=_FORMS)
                if not data and key == "format" and isinstance(inner, str) and inner in _NOTES:
                    continue
                if not data and key == "anyOf" and isinstance(inner, (list, tuple)):
                    inner = _expressible(inner)
                joined = joined or (not data and key in _JOINING)
                result[copy(key, depth, True)] = copy(inner, depth + 1, data or key in ("const", "enum", "default", "examples"))
            return result
        if isinstance(value, (list, tuple)):
            return [copy(inner, depth + 1, data) for inner in value]
        raise UnsupportedSchema(f"The JSON schema holds a {type(value).__name__}, which is no JSON.", hint=_FORMS)

    if isinstance(schema, bool):
        return {} if schema else {"enum": []}
    if not isinstance(schema, Mapping):
        raise UnsupportedSchema("The JSON schema is neither an object nor true or false.", hint=_FORMS)
    checked = copy(schema, 0, False)
    if not joined:
        _close(checked)
    return checked


_JOINING = frozenset(("allOf", "if", "dependentSchemas", "unevaluatedProperties", "$dynamicRef"))
"""Where several schemas speak of one object, none of them names all of its properties."""

_OTHERS = frozenset(("anyOf", "oneOf", "$ref"))
"""The same, beside `properties`."""


def _close(schema: object) -> None:
    """Allow no properties beside the named ones, in a checked schema and those in it."""
    if isinstance(schema, list):
        for inner in schema:
            _close(inner)
    if not isinstance(schema, dict):
        return
    if isinstance(schema.get("properties"), dict) and not schema.keys() & {"additionalProperties", "patternProperties"}:
        schema["additionalProperties"] = False
    for key, inner in schema.items():
        if key in ("properties", "$defs", "definitions", "patternProperties") and isinstance(inner, dict):
            for part in inner.values():
                _close(part)
        elif key in ("items", "prefixItems", "additionalItems", "additionalProperties", "anyOf", "oneOf", "not"):
            _close(inner)


def _expressible(options: Sequence[object]) -> Sequence[object]:
    """Without those whose pattern looks around, which cannot be kept to: the others suffice. pydantic's Decimal is a number, or such a text."""
    kept = [option for option in options if not (isinstance(option, Mapping) and re.search(r"\(\?<?[=!]", str(option.get("pattern", ""))))]
    return kept or options


_vocabularies: WeakKeyDictionary[Tokenizer, dict[tuple[int, frozenset[int]], llguidance.LLTokenizer]] = WeakKeyDictionary()
_lock = threading.Lock()


def _vocabulary(tokenizer: Tokenizer, limit: int, stops: frozenset[int]) -> llguidance.LLTokenizer:
    """A tokenizer in llguidance's shape; kept as long as the tokenizer lives."""
    with _lock:
        known = _vocabularies.setdefault(tokenizer, {})
        if (limit, stops) not in known:
            tokens = [tokenizer.token_bytes(number) for number in range(limit)]
            control = {number: name.encode() for name, number in tokenizer.special.items() if number < limit}
            for number, name in control.items():
                tokens[number] = name
            spelled = {token: number for number, token in enumerate(tokens) if len(token) == 1}
            encode = functools.partial(_encode, ref(tokenizer), limit, spelled)  # weakly, or none would ever be let go
            known[limit, stops] = _wrapped(tokens, sorted(control), encode, sorted(stop for stop in stops if stop < limit))
        return known[limit, stops]


def _encode(known: ref[Tokenizer], limit: int, spelled: Mapping[bytes, int], data: bytes) -> list[int]:
    """The ids that a model would read for bytes that must follow; byte by byte where the tokenizer would change them (Unicode's NFC),
    or is gone."""
    tokenizer = known()
    if tokenizer is not None:
        ids = tokenizer.encode(data.decode())
        if max(ids, default=0) < limit and b"".join(map(tokenizer.token_bytes, ids)) == data:
            return ids
    return [spelled[data[index : index + 1]] for index in range(len(data))]


@functools.cache
def _bytes_vocabulary() -> llguidance.LLTokenizer:
    """Every byte is a token."""
    return _wrapped([bytes([byte]) for byte in range(256)], [], list, [])


def _wrapped(tokens: list[bytes], control: list[int], encode: Callable[[bytes], list[int]], stops: list[int]) -> llguidance.LLTokenizer:
    import llguidance

    # One id more, that no model has: the end, for models without a stop.
    shape = _Shape([*tokens, b"<end>"], [*control, len(tokens)], encode)
    return llguidance.LLTokenizer(llguidance.TokenizerWrapper(cast(Any, shape)), len(tokens) + 1, stops or [len(tokens)])


class _Shape:
    """What llguidance asks of a tokenizer."""

    bos_token_id = None

    def __init__(self, tokens: list[bytes], special: list[int], encode: Callable[[bytes], list[int]]) -> None:
        self.tokens, self.special_token_ids, self.eos_token_id = tokens, special, len(tokens) - 1
        self._encode = encode

    def __call__(self, data: bytes) -> list[int]:
        return self._encode(data)
