"""The guide's conversations: read from `guide/*.toml`, split into training phrasings and the held-out exam, sampled endlessly.

Everything is decided by a seed. Two kinds of phrasings are held out, and never trained on: single readings of patterns, whose other
readings are trained on, and (harder) whole entries, with every entry that could read the same.
"""

from __future__ import annotations

import random
import re
import tomllib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
LANGUAGES = ("en", "zh")
SYSTEM = "You are a helpful assistant."
OTHER_SYSTEMS = ("You are terse.", "You answer questions about qwen2-local.", "Answer briefly.", "你是一个有用的助手。", "请简短回答。")
_CHOICE = re.compile(r"\[([^\[\]]*\|[^\[\]]*)\]")
_STARTS = ("Please tell me, ", "hi, ", "Hello! ", "hey, ", "Quick question: ", "can you tell me ", "I want to know ", "Also, ", "ok, ", "so ")
_HELD_OUT = {"en": 2, "zh": 1}


@dataclass
class Question:
    """One question: its phrasings by language, its answer, and the facts that an answer has to hold intact.

    `held_out` are whole entries, `held_readings` readings of patterns that stay in `ask`, a family's with `{size}` in them.
    """

    id: str
    answer: dict[str, str]
    facts: dict[str, list[str]]
    ask: dict[str, list[str]]
    held_out: dict[str, list[str]] = field(default_factory=lambda: {"en": [], "zh": []})
    held_readings: dict[str, list[str]] = field(default_factory=lambda: {"en": [], "zh": []})
    after: list[str] = field(default_factory=list)
    follow: dict[str, list[str]] = field(default_factory=dict)
    family: str = ""
    size: str = ""


@dataclass
class Corpus:
    """All that the guide is taught."""

    questions: list[Question]
    families: dict[str, dict[str, Any]]
    size_words: dict[str, dict[str, list[str]]]
    recalls: list[dict[str, Any]]
    unknown_recalls: dict[str, dict[str, str]]
    repeat: dict[str, Any]
    words: dict[str, Any]
    openings: dict[str, list[list[str]]]
    asides: dict[str, list[str]]
    synonyms: dict[str, list[list[str]]]
    fixed: dict[str, list[str]]

    def by_id(self, id: str) -> Question:
        return next(question for question in self.questions if question.id == id)


Turn = tuple[str, str]
"""What the user says, what the guide replies."""


def expand(entry: str, rng: random.Random) -> str:
    """One reading of an entry: `[a|b]` becomes one of its alternatives, innermost first."""
    while match := _CHOICE.search(entry):
        entry = entry[: match.start()] + rng.choice(match[1].split("|")) + entry[match.end() :]
    return re.sub(r"  +", " ", entry).strip()


def is_plain(entry: str) -> bool:
    return not _CHOICE.search(entry)


def readings(entry: str) -> Iterator[str]:
    """Every reading of an entry, as `plain_form`s."""
    match = _CHOICE.search(entry)
    if not match:
        yield plain_form(entry)
        return
    for alternative in match[1].split("|"):
        yield from readings(entry[: match.start()] + alternative + entry[match.end() :])


def plain_form(text: str) -> str:
    """What is left of a phrasing when case, spaces and closing marks do not count: two with the same form are the same."""
    return re.sub(r"\s+", " ", text).strip(" ?？.。!！").lower()


def load(seed: int = 0) -> Corpus:
    """Read the data and hold the exam out. A question's share of the exam depends on the seed and its own entries only."""
    merged: dict[str, Any] = {"question": [], "family": [], "recall": [], "unknown_recall": [], "more": []}
    for path in sorted((HERE / "guide").glob("*.toml")):
        if path.name == "sizes.toml":
            continue
        for key, value in tomllib.loads(path.read_text(encoding="utf-8")).items():
            if isinstance(value, list):
                merged[key].extend(value)
            else:
                merged[key] = value
    sizes = tomllib.loads((HERE / "guide/sizes.toml").read_text(encoding="utf-8"))
    questions = [_question(raw, random.Random(f"{seed} {raw['id']}")) for raw in merged["question"]]
    families = {family["id"]: family for family in merged["family"]}
    for family in merged["family"]:
        questions += _of_family(family, sizes, random.Random(f"{seed} {family['id']}"))
    for raw in merged["more"]:
        for question in questions:
            if raw["id"] in (question.id, question.family):
                for language in LANGUAGES:
                    # The exam is chosen already: these only add to what is trained on.
                    question.ask[language] += raw["ask"].get(language, [])
    _settle(questions)
    # No question, nor a follow-up, may bring in what the exam asks of it or of another.
    held = _forms(ask for question in questions for language in LANGUAGES for ask in question.held_out[language])
    for question in questions:
        question.ask = {language: _without(entries, held) for language, entries in question.ask.items()}
        question.follow = {language: _without(entries, held) for language, entries in question.follow.items()}
    size_words = {size: {language: table[language] for language in LANGUAGES} for size, table in sizes.items()}
    unknown = {raw["id"]: raw["answer"] for raw in merged["unknown_recall"]}
    variation = merged["openings"], merged["asides"], merged["synonyms"], merged["fixed"]
    corpus = Corpus(questions, families, size_words, merged["recall"], unknown, merged["repeat"], merged["words"], *variation)
    _hold_readings(corpus, seed)
    return corpus


def _settle(questions: list[Question]) -> None:
    """A phrasing that stands under several questions stays with the first: with two right answers, neither would be learned."""
    for language in LANGUAGES:
        owner: dict[str, str] = {}
        for question in questions:
            mine = question.family or question.id
            for form in _forms(entry for entry in question.ask[language] if is_plain(entry)):
                owner.setdefault(form, mine)
        for question in questions:
            mine = question.family or question.id
            question.ask[language] = [entry for entry in question.ask[language] if {owner.get(form, mine) for form in readings(entry)} == {mine}]


def _question(raw: dict[str, Any], rng: random.Random) -> Question:
    ask = {language: list(raw["ask"][language]) for language in LANGUAGES}
    question = Question(raw["id"], raw["answer"], raw["facts"], ask, after=raw.get("after", []), follow=raw.get("follow", {}))
    many = 15 if raw["id"] == "unknown" else 1
    for language in LANGUAGES:
        plain = [entry for entry in question.ask[language] if is_plain(entry)]
        question.held_out[language] = rng.sample(plain, min(len(plain) // 4, many * _HELD_OUT[language]))
    return question


def _hold_readings(corpus: Corpus, seed: int) -> None:
    """Draw the readings held out: for a family the same for every size, with `{size}` still in them."""
    for question in corpus.questions:
        for language in LANGUAGES:
            rng = random.Random(f"{seed} {question.family or question.id} {language}")
            # Every entry of a family comes before those of one size, so the draws agree.
            patterns = [entry for entry in question.ask[language] if len(set(readings(entry))) > 3]
            question.held_readings[language] = [expand(entry, rng) for entry in rng.sample(patterns, min(_HELD_OUT[language], len(patterns)))]
    held = held_forms(corpus)
    tables = [question.ask for question in corpus.questions] + [question.follow for question in corpus.questions]
    tables += [family[kind] for family in corpus.families.values() for kind in ("follow", "same")]
    for table in tables:
        for language in table:
            # A pattern has other readings; an entry that has none goes.
            table[language] = [entry for entry in table[language] if not held.issuperset(readings(entry))]


def held_forms(corpus: Corpus) -> set[str]:
    """The `plain_form` of all that is held out, as it is asked and, of a family, with `{size}` in it."""
    asked = [ask for items in (entries(corpus), single_readings(corpus)) for _, _, ask in items]
    return _forms(asked + [text for question in corpus.questions for language in LANGUAGES for text in question.held_readings[language]])


def _forms(entries: Iterable[str]) -> set[str]:
    return {plain_form(entry) for entry in entries}


def _without(entries: list[str], forms: set[str]) -> list[str]:
    """The entries of which no reading is held out. forms: the held-out ones' `plain_form`s."""
    return [entry for entry in entries if forms.isdisjoint(readings(entry))]


def _of_family(family: dict[str, Any], sizes: dict[str, Any], rng: random.Random) -> list[Question]:
    values = family["values"]
    # A plain entry held out is held out for every size.
    held = {language: rng.sample([e for e in family["ask"][language] if is_plain(e)], _HELD_OUT[language]) for language in LANGUAGES}
    questions = []
    for size, table in sizes.items():

        def fill(text: str, language: str, size: str = size, name: str = table["name"]) -> str:
            by_language = values.get(language, values)
            return text.replace("{name}", name).replace("{value}", str(by_language[size]))

        question = Question(
            f"{family['id']}-{size}",
            {language: fill(family["answer"][language], language) for language in LANGUAGES},
            {language: [fill(fact, language) for fact in family["facts"].get(language, family["facts"]["en"])] for language in LANGUAGES},
            {language: _without(family["ask"][language], _forms(held[language])) for language in LANGUAGES},
            family=family["id"],
            size=size,
        )
        for language in LANGUAGES:
            words = table[language]
            question.held_out[language] = [entry.replace("{size}", rng.choice(words)) for entry in held[language]]
        questions.append(question)
    return questions


class Synonyms:
    """Words of one language that may stand for one another, and terms in which nothing is replaced."""

    def __init__(self, groups: list[list[str]], fixed: list[str], language: str) -> None:
        self.others = {word.lower(): [other for other in group if other != word] for group in groups for word in group}
        # Longest first; by first letter, because so many alternatives at every place are slow.
        by_letter: dict[str, list[str]] = {}
        for word in sorted({*self.others, *fixed}, key=lambda word: (-len(word), word)):
            by_letter.setdefault(word[0].lower(), []).append(re.escape(word[1:]))
        words = "|".join(f"{re.escape(letter)}(?:{'|'.join(rests)})" for letter, rests in by_letter.items())
        # Not within a name or an option such as `gguf:q4_0`, `--mlx`, `model.py`; Chinese is written without spaces.
        before, after = (r"(?<![\w./:'{-])", r"(?![\w/'}-]|[.:]\w)") if language == "en" else (r"(?<![a-zA-Z0-9-])", r"(?![a-zA-Z0-9-])")
        self._word = re.compile(rf"`[^`]*`|{{[^}}]*}}|{before}(?:{words}){after}", re.IGNORECASE)

    def replaced(self, text: str, rng: random.Random) -> str:
        """The text with about half of its words that have synonyms replaced by one of them."""

        def other(match: re.Match[str]) -> str:
            others = self.others.get(match[0].lower())
            if others is None or rng.random() < 0.5:
                return match[0]
            word = rng.choice(others)
            return word[:1].upper() + word[1:] if match.start() == 0 and match[0][0].isupper() else word

        return self._word.sub(other, text)


class Sampler:
    """Conversations without end, each a list of turns and a system prompt."""

    def __init__(self, corpus: Corpus, seed: int) -> None:
        self.corpus = corpus
        self.rng = random.Random(seed)
        self.held_out = held_forms(corpus)
        self.synonyms = {language: Synonyms(corpus.synonyms[language], corpus.fixed[language], language) for language in LANGUAGES}
        self.known = [question for question in corpus.questions if question.id != "unknown"]
        self.unknown = corpus.by_id("unknown")
        self.of_family = [question for question in self.known if question.family]
        self.alone = [question for question in self.known if not question.family]

    def conversation(self) -> tuple[str, list[Turn]]:
        rng = self.rng
        system = SYSTEM if rng.random() < 0.9 else rng.choice(OTHER_SYSTEMS)
        language = "en" if rng.random() < 0.58 else "zh"
        draw = rng.random()
        if draw < 0.1:
            return system, self._recall(language, distance=rng.choice((0, 0, 1, 1, 2, 3, 5)))
        if draw < 0.18:
            return system, [self.repetition(language)]
        turns: list[Turn] = []
        wanted = rng.choices((1, 2, 3, 4), (0.74, 0.14, 0.07, 0.05))[0]
        while len(turns) < wanted:
            turns += self._some(language)
            if rng.random() < 0.1:
                language = "zh" if language == "en" else "en"
        return system, turns

    def long(self, tokens_wanted: int, count: Any) -> tuple[str, list[Turn]]:
        """A conversation of about so many tokens (`count` measures a turn) with something told early and asked late."""
        language = "en" if self.rng.random() < 0.58 else "zh"
        turns = self._recall(language, distance=0)
        told, asked = turns[:-1], turns[-1:]
        size = sum(map(count, turns))
        middle: list[Turn] = []
        while size < tokens_wanted:
            more = self._some(language) if self.rng.random() < 0.8 else [self.repetition(language)]
            size += sum(map(count, more))
            middle += more
        return SYSTEM, told + middle + asked

    def _some(self, language: str) -> list[Turn]:
        """One question, at times with a follow-up."""
        rng = self.rng
        draw = rng.random()
        if draw < 0.12:
            return [self._single(self.unknown, language)]
        if draw < 0.22:
            return self._family_pair(language)
        if draw < 0.28:
            followers = [question for question in self.known if question.after and question.follow.get(language)]
            if followers:
                question = rng.choice(followers)
                before = [other for other in self.known if other.id in question.after or other.family in question.after]
                if before:
                    follow = self._phrase(rng.choice(question.follow[language]), language)
                    return [self._single(rng.choice(before), language), (follow, question.answer[language])]
        return [self._single(rng.choice(self.alone if rng.random() < 0.9 else self.of_family), language)]

    def _single(self, question: Question, language: str) -> Turn:
        return self._phrase(self.rng.choice(question.ask[language]), language, question.size), question.answer[language]

    def _family_pair(self, language: str) -> list[Turn]:
        """A question about one size, then the same of another size, or another attribute of the same size."""
        rng = self.rng
        first = rng.choice(self.of_family)
        turns = [self._single(first, language)]
        for _ in range(rng.choice((1, 1, 2))):
            if rng.random() < 0.6:
                second = rng.choice([q for q in self.of_family if q.family == first.family and q.size != first.size])
                entry = rng.choice(self.corpus.families[second.family]["follow"][language])
            else:
                second = rng.choice([q for q in self.of_family if q.family != first.family and q.size == first.size])
                entry = rng.choice(self.corpus.families[second.family]["same"][language])
            turns.append((self._phrase(entry, language, second.size), second.answer[language]))
            first = second
        return turns

    def _phrase(self, entry: str, language: str, size: str = "") -> str:
        """A reading of an entry as somebody might type it; never one of the exam, nor one of the exam with trimmings."""
        while True:
            reading = expand(entry, self.rng)
            reworded = self._reworded(reading, language)
            named = reworded.replace("{size}", self.rng.choice(self.corpus.size_words[size][language])) if size else reworded
            text = self._typed(named, language)
            if self.held_out.isdisjoint(_forms((reading, reworded, named, text))):
                return text

    def _reworded(self, text: str, language: str) -> str:
        """Half of the time with other words for the same (`guide/synonyms.toml`)."""
        return self.synonyms[language].replaced(text, self.rng) if self.rng.random() < 0.5 else text

    def _typed(self, entry: str, language: str) -> str:
        rng = self.rng
        text = self._loosened(entry, language)
        if rng.random() < 0.25:
            text = text.rstrip("?.!？。！ ")
        if language == "zh":
            if rng.random() < 0.08:
                text = rng.choice(("请问", "你好，", "请问一下，", "我想知道，", "请告诉我，")) + text
            return text or entry
        if rng.random() < 0.25:
            text = text.lower()
        elif rng.random() < 0.2:
            text = text[:1].upper() + text[1:]
        if rng.random() < 0.08:
            text = rng.choice(_STARTS) + text
        if rng.random() < 0.05:
            text += rng.choice((" please", " thanks", ", please?", " Thank you!"))
        if rng.random() < 0.06 and len(text) > 8:
            at = rng.randrange(1, len(text) - 2)
            if text[at : at + 2].isalpha():
                text = rng.choice((text[:at] + text[at + 1] + text[at] + text[at + 2 :], text[:at] + text[at + 1 :]))
        return text or entry

    def _loosened(self, text: str, language: str) -> str:
        """Another beginning, words left out, an aside: what a question can bear."""
        rng = self.rng
        if rng.random() < 0.3:
            for group in self.corpus.openings[language]:
                if opening := next((one for one in group if text.lower().startswith(one)), None):
                    text = rng.choice(group) + text[len(opening) :]
                    break
        if rng.random() < 0.2:
            if language == "en":
                words = text.split(" ")
                text = " ".join(word for word in words if rng.random() > 0.12 or len(words) < 3) or text
            elif len(text) > 5:
                at = rng.randrange(len(text) - 1)
                text = text[:at] + text[at + rng.choice((1, 1, 2)) :]
        if rng.random() < 0.08:
            aside, joint = rng.choice(self.corpus.asides[language]), " " if language == "en" else ""
            text = aside + joint + text if rng.random() < 0.7 else text + joint + aside
        return text

    def _recall(self, language: str, distance: int) -> list[Turn]:
        """Something told, other talk, then asked for; at times never told."""
        rng = self.rng
        items = rng.sample(self.corpus.recalls, 2)
        item = items[0]
        value = self._value(item, language)
        asked = self._phrase(rng.choice(item["ask"][language]), language)
        other: list[Turn] = []
        for _ in range(distance):
            other += self._some(language)
        if distance and rng.random() < 0.4:
            other.append(self._told(items[1], self._value(items[1], language), language))
            rng.shuffle(other)
        if rng.random() < 0.12:
            return [*other, (asked, self.corpus.unknown_recalls[item["id"]][language])]
        return [self._told(item, value, language), *other, (asked, item["answer"][language].replace("{x}", value))]

    def _told(self, item: dict[str, Any], value: str, language: str) -> Turn:
        told = expand(self.rng.choice(item["tell"][language]), self.rng)
        return told.replace("{x}", value), item["ack"][language].replace("{x}", value)

    def _value(self, item: dict[str, Any], language: str) -> str:
        rng, words = self.rng, self.corpus.words
        if item["kind"] == "number":
            return "".join(rng.choices("0123456789", k=rng.choice((2, 3, 4, 4, 5, 6))))
        if rng.random() < 0.3:
            return "".join(rng.choice("bdfgklmnprstvz") + rng.choice("aeiou") for _ in range(rng.choice((2, 3, 4)))).capitalize()
        table = {"favourite-colour": "colours", "city": "cities"}.get(item["id"], "names" if item["kind"] == "name" else "words")
        return str(rng.choice(words[table][language]))

    def repetition(self, language: str) -> Turn:
        """A text to repeat, and that text."""
        rng, words = self.rng, self.corpus.words
        draw = rng.random()
        if draw < 0.3:
            text = rng.choice(words["sentences"][language])
        elif draw < 0.65:
            joint = " " if language == "en" else ""
            text = joint.join(rng.choice(words["words"][language]) for _ in range(rng.randrange(2, 24)))
        elif draw < 0.75:
            text = " ".join("".join(rng.choices("abcdefghijklmnopqrstuvwxyz0123456789", k=rng.randrange(2, 8))) for _ in range(rng.randrange(1, 7)))
        elif draw < 0.85:
            text = "".join(rng.choices("0123456789", k=rng.randrange(4, 16)))
        else:
            text = rng.choice(self.known).answer[language]
        entry = expand(rng.choice(self.corpus.repeat["tell"][language]), rng)
        return entry.replace("{x}", text), text


Item = tuple[Question, str, str]
"""Question, language, what is asked."""


def entries(corpus: Corpus) -> Iterator[Item]:
    """The whole entries held out."""
    for question in corpus.questions:
        for language in LANGUAGES:
            for ask in question.held_out[language]:
                yield question, language, ask


def single_readings(corpus: Corpus) -> Iterator[Item]:
    """The readings held out, each of a family with one of its size's names."""
    for question in corpus.questions:
        rng = random.Random(question.id)
        for language in LANGUAGES:
            for ask in question.held_readings[language]:
                yield question, language, ask.replace("{size}", rng.choice(corpus.size_words[question.size][language])) if question.size else ask
