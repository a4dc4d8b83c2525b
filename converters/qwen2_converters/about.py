"""What a GGUF file says of a model beside its shape: its name taken apart, its licence, what it was made from. As gguf-py's Metadata finds it."""

from __future__ import annotations

import re

from qwen2_local.formats.checkpoint import Checkpoint, member
from qwen2_local.formats.model_card import read_card, read_card_lists

_SIZE = re.compile(r"(?P<active>[aA])?(?P<number>[0-9]{1,4}(\.[0-9]{1,3})?)(?P<unit>[kmbtKMBT])")
_FINETUNE = re.compile(r"chat|instruct", re.IGNORECASE)
_VERSION = re.compile(r"v?[0-9]+(\.[0-9]+)*", re.IGNORECASE)
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)
_TITLED = re.compile(r"v?[0-9].*", re.IGNORECASE)


def names(name: str, count: int) -> dict[str, str]:
    """The keys that take a model's name apart: "Qwen2-7B-Instruct" has a basename, a size and a finetune. count: of its weights.

    As gguf-py does it, for names that hold a size; else only the size is there, counted.
    """
    words = [word for word in name.split("-") if word]
    sizes = [word.upper() for word in words[1:] if _is_size(word, count)] if " " not in name else []
    if not sizes:
        return {"general.size_label": size_label(count)}
    after = [bool(_SIZE.fullmatch(word) or _FINETUNE.fullmatch(word)) for word in words]
    start = after.index(True, 1)
    tuned = [_context(word) for word in words[start:] if not _is_size(word, count) and not _VERSION.fullmatch(word)]
    versions = [word for word in words[start:] if _VERSION.fullmatch(word)]
    found = {"basename": words[:start], "finetune": tuned, "version": versions, "size_label": list(dict.fromkeys(sizes))}
    return {f"general.{key}": "-".join(parts) for key, parts in found.items() if parts}


def _context(word: str) -> str:
    """Lengths of context in small letters: "32k". Other words as they are."""
    return word.lower() if _SIZE.fullmatch(word) else word


def _is_size(word: str, count: int) -> bool:
    """Is it "7B", "0.5B" or "A14B", and no length of context such as "32K"?"""
    match = _SIZE.fullmatch(word)
    if not match:
        return False
    if match["active"]:
        return True
    claimed = float(match["number"]) * 10.0 ** (3 * " KMBT".index(match["unit"].upper()))
    return abs(claimed - count) <= 7 * count / 8


def size_label(count: int) -> str:
    """A count of weights as GGUF files spell it, two digits or more: "494M", "7.6B"."""
    size, letter = next((unit for unit in ((1e12, "T"), (1e9, "B"), (1e6, "M")) if count > unit[0]), (1e3, "K"))
    return f"{count / size:.{1 if round(count / size) < 10 else 0}f}{letter}"


def licence(checkpoint: Checkpoint) -> dict[str, str]:
    """The keys general.license, .name and .link, as far as the head of README.md, where Hugging Face keeps them, has them."""
    found = read_card(member(checkpoint.folder, "README.md"))
    return {f"general.{name.replace('_', '.')}": value for name, value in found.items()}


def lineage(checkpoint: Checkpoint) -> dict[str, str | int | list[str]]:
    """What the model was made from, its tags and languages, as far as its README.md says so."""
    card = read_card_lists(member(checkpoint.folder, "README.md"))
    keys: dict[str, str | int | list[str]] = {}
    bases = [base for base in card.get("base_model", ()) if _HUB_ID.fullmatch(base)]
    if bases:
        keys["general.base_model.count"] = len(bases)
    for number, base in enumerate(bases):
        organization, _, model = base.partition("/")
        keys[f"general.base_model.{number}.name"] = _title(model)
        keys[f"general.base_model.{number}.organization"] = _title(organization)
        keys[f"general.base_model.{number}.repo_url"] = f"https://huggingface.co/{base}"
    for key, fields in (("tags", ("tags", "pipeline_tag")), ("languages", ("language", "languages"))):
        values = [value for field in fields for value in card.get(field, ())]
        if values:
            keys[f"general.{key}"] = values
    return keys


def _title(text: str) -> str:
    """A hub's id for people: "my-model-7B" is "My Model 7B"."""
    return " ".join(word.title() if word.islower() and not _TITLED.fullmatch(word) else word for word in text.replace("-", " ").split())
