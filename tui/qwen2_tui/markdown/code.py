"""Code, highlighted line by line: a line's colours depend on the lines before it, and never on those to come."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

from pygments.lexer import Lexer, RegexLexer
from pygments.lexers import get_all_lexers, get_lexer_by_name
from pygments.token import Comment, Error, Generic, Keyword, Name, Number, Operator, String, Token, Whitespace, _TokenType

from qwen2_tui.markdown.ink import Kind, Run, ink

LONGEST = 400  # characters: a longer line is no code that anyone reads, and some grammars take the square of its length

_KINDS = {
    Keyword: Kind.KEYWORD,
    Operator.Word: Kind.KEYWORD,
    Name.Function: Kind.NAME,
    Name.Class: Kind.NAME,
    Name.Tag: Kind.KEYWORD,
    Name.Attribute: Kind.NAME,
    Name.Decorator: Kind.BUILTIN,
    Name.Builtin: Kind.BUILTIN,
    Name.Exception: Kind.BUILTIN,
    String: Kind.STRING,
    Number: Kind.NUMBER,
    Comment: Kind.COMMENT,
    Generic.Inserted: Kind.ADDED,
    Generic.Deleted: Kind.REMOVED,
    Generic.Heading: Kind.NAME,
    Generic.Subheading: Kind.NAME,
    Generic.Prompt: Kind.COMMENT,
    Token: Kind.CODE,
}


@dataclass(frozen=True, slots=True)
class _State:
    """Where a grammar stands between two lines. inside: a comment from /* to */, which most grammars know as a whole only."""

    stack: tuple[str, ...] = ("root",)
    inside: bool = False


def language(info: str) -> str:
    """The language of a fence, from what stands behind it: "py" of "py title=x" and of "{.py}"."""
    words = info.strip("{}. ").replace(",", " ").replace(":", " ").split()
    return words[0][:24] if words else ""


def highlight(language: str, lines: Iterable[str]) -> Iterator[tuple[Run, ...]]:
    """Each of the lines of a block of code, in its colours. What was highlighted a moment ago costs nothing."""
    state = _State()
    language = language.lower()
    for line in lines:
        runs, state = _step(language, state, line)
        yield runs


@lru_cache(2048)
def _step(language: str, state: _State, line: str) -> tuple[tuple[Run, ...], _State]:
    lexer = _lexer(language)
    if lexer is None or len(line) > LONGEST:
        return (((line, ink(Kind.CODE)),) if line else ()), state
    tokens: list[tuple[Any, str]] = []
    if state.inside:
        end = line.find("*/") + 2
        if end < 2:
            return (((line, ink(Kind.COMMENT)),) if line else ()), state
        tokens.append((Comment, line[:end]))
        line, state = line[end:], replace(state, inside=False)
    opens = line.rfind("/*") > line.rfind("*/") and _has_block_comments(lexer)
    found, stack = _tokens(lexer, line + "*/" if opens else line, state.stack)
    if opens and found[-1][0] in Comment and found[-1][0] not in Comment.Single and found[-1][1].endswith("*/"):
        found[-1] = (found[-1][0], found[-1][1][:-2])
        state = replace(state, inside=True)
    elif opens:  # in a string, most likely
        found, stack = _tokens(lexer, line, state.stack)
    return _runs([*tokens, *found]), replace(state, stack=stack)


def _runs(tokens: Iterable[tuple[Any, str]]) -> tuple[Run, ...]:
    made: list[Run] = []
    for token, text in tokens:
        colour = ink(_kind(token))
        if made and made[-1][1] == colour:
            made[-1] = (made[-1][0] + text, colour)
        else:
            made.append((text, colour))
    return tuple(made)


def _tokens(lexer: Lexer, line: str, stack: tuple[str, ...]) -> tuple[list[tuple[Any, str]], tuple[str, ...]]:
    """The tokens of a line, and the state for the next."""
    if type(lexer).get_tokens_unprocessed is RegexLexer.get_tokens_unprocessed:
        found, stack = _lex(lexer, line + "\n", stack)
    else:  # a grammar of its own kind: each line for itself
        found = [(token, text) for _, token, text in lexer.get_tokens_unprocessed(line + "\n")]
    tokens = [(token, bare) for token, text in found if (bare := text.replace("\n", ""))]
    return tokens if "".join(text for _, text in tokens) == line else [(Token, line)], stack


def _lex(lexer: Any, text: str, stack: Sequence[str]) -> tuple[list[tuple[Any, str]], tuple[str, ...]]:
    """`RegexLexer.get_tokens_unprocessed`, which also tells the state that it ends in."""
    found: list[tuple[Any, str]] = []
    states = list(stack)
    rules = lexer._tokens[states[-1]]
    position = 0
    while position < len(text):
        for match_rule, action, new_state in rules:
            match = match_rule(text, position)
            if match is None:
                continue
            if type(action) is _TokenType:
                found.append((action, match.group()))
            elif action is not None:
                found += [(token, value) for _, token, value in action(lexer, match)]
            position = match.end()
            if new_state is not None:
                _move(states, new_state)
                rules = lexer._tokens[states[-1]]
            break
        else:
            if text[position] == "\n":
                states = ["root"]
                rules = lexer._tokens["root"]
                found.append((Whitespace, "\n"))
            else:
                found.append((Error, text[position]))
            position += 1
    return found, tuple(states)


def _move(states: list[str], move: Any) -> None:
    """What a rule says of the states: names to push, "#pop", "#push", or minus how many to pop. The root stays."""
    if isinstance(move, int):
        del states[max(1, len(states) + move) :]
        return
    for state in (move,) if isinstance(move, str) else move:
        if state == "#pop":
            del states[max(1, len(states) - 1) :]
        else:
            states.append(states[-1] if state == "#push" else state)


@lru_cache(1024)
def _kind(token: Any) -> Kind:
    while token not in _KINDS:
        token = token.parent
    return _KINDS[token]


@lru_cache(1)
def _names() -> dict[str, str]:
    """What a fence may call a language: a name that pygments has. Its plugins are not asked: they would be looked for at every unknown name."""
    return {alias.lower(): names[0] for name, names, *_ in get_all_lexers(plugins=False) if names for alias in (name, *names)}


@lru_cache(64)
def _lexer(language: str) -> Lexer | None:
    name = _names().get(language)
    return None if name is None or name == "text" else get_lexer_by_name(name)


@lru_cache(64)
def _has_block_comments(lexer: Lexer) -> bool:
    return any(token in Comment and text == "/*a\nb*/" for token, text in lexer.get_tokens("/*a\nb*/"))
