"""What a person typed after `pull`, understood: a name of the catalog, a hub's id, an address, or a path."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal
from urllib.parse import unquote, urlsplit

from qwen2_converters.hub.repository import SourceName
from qwen2_local.catalog import CATALOG, SIZES, CatalogModel, lookup, suggestions
from qwen2_local.errors import UnknownModel, UsageError
from qwen2_local.store import GUIDE

_ID = r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}"
_REPOSITORY = re.compile(rf"(?P<id>{_ID})(?::(?P<level>[\w.-]+))?", re.ASCII)
_VARIANT = re.compile(r"-(?:gguf|mlx|awq|gptq-int[48])$", re.IGNORECASE)
_HUGGING_FACE = ("huggingface.co", "hf.co")
_MODELSCOPE = ("modelscope.cn", "modelscope.ai")
_LOOPBACK = ("localhost", "127.0.0.1", "::1")


@dataclass(frozen=True, slots=True)
class Asked:
    """What is wanted. kind: "repository" for hub ids and names of the catalog. where: the hub's id, the address, or the path.

    level: "q8_0", "mlx-4bit", "original", or "" for what fits best. file: the path of one GGUF in the repository, where it was named.
    model: of the catalog, if it is one of its. exact: only this repository, not its siblings with other formats. source: where it was
    named ("" if it was not).
    """

    kind: Literal["repository", "address", "path"]
    where: str
    level: str = ""
    file: str = ""
    revision: str = ""
    model: CatalogModel | None = None
    exact: bool = False
    source: SourceName | Literal[""] = ""


def understand(text: str) -> Asked:
    """What `text` means. Paths that are there come before ids, names of the catalog before paths. Raises UnknownModel, UsageError."""
    text = text.strip()
    if not text or "\0" in text:
        raise UnknownModel("the name of a model is missing.", hint="`qwen2-local pull 7b`, say.")
    if text.lower() == GUIDE:
        raise UsageError(f"{GUIDE} is built in: there is nothing to fetch.", hint=f"`qwen2-local run {GUIDE}` runs it.")
    if "://" in text:
        return _address(text)
    if text.lower().startswith(tuple(f"{host}/" for host in (*_HUGGING_FACE, *_MODELSCOPE))):
        return _address(f"https://{text}")
    if "/" not in text and (known := lookup(text)):
        model, level = known
        return Asked("repository", model.repo, level=level or "", model=model)
    path = Path(text).expanduser() if text.startswith("~") else Path(text)
    if path.exists():
        return Asked("path", str(path))
    if match := _REPOSITORY.fullmatch(text):
        return of_repository(match["id"], level=(match["level"] or "").lower())
    if "/" in text or text.lower().endswith(".gguf"):
        raise UnknownModel(f"there is no file or folder {text[:200]}, and it is no hub's id.", hint="An id looks like Qwen/Qwen2-7B-Instruct.")
    close = suggestions(text)
    ask = f"Did you mean {' or '.join(close)}?\n  " if close else ""
    sizes = ", ".join(size.name for size in SIZES)
    raise UnknownModel(f'no model is called "{text[:100]}".', hint=f"{ask}Qwen2 comes as {sizes}; other models by their hub's id, NAME/MODEL.")


def of_repository(id: str, *, level: str = "", source: SourceName | Literal[""] = "", revision: str = "", file: str = "") -> Asked:
    """A hub's id. One of an original of the catalog stands for all its official variants; any other for itself alone."""
    asked = Asked("repository", id, level=level, source=source, revision=revision, file=file, exact=True)
    plain = _VARIANT.sub("", id).lower()
    for model in CATALOG:
        if plain == model.repo.lower():
            return replace(asked, model=model, exact=plain != id.lower())
    return asked


def _address(text: str) -> Asked:
    try:
        parts = urlsplit(text)
        host = (parts.hostname or "").lower().removeprefix("www.")
    except ValueError:
        raise UsageError(f"{text[:200]} is no valid address.", hint="Copy it again.") from None
    if parts.username or parts.password:
        raise UsageError("An address with a password in it is not used.", hint="Set HF_TOKEN for what needs a login.")
    if parts.scheme != "https" and not (parts.scheme == "http" and host in _LOOPBACK):
        raise UsageError(f"{text[:200]} is no https address.", hint="Only https is fetched from.")
    path = [unquote(part) for part in parts.path.split("/") if part]
    endpoint = os.environ.get("HF_ENDPOINT", "").rstrip("/")
    if host in _HUGGING_FACE or (endpoint and text.startswith(f"{endpoint}/") and not parts.path.lower().endswith(".gguf")):
        return _of_hub("huggingface", path, text)
    if host in _MODELSCOPE:
        return _of_hub("modelscope", path[1:] if path[:1] == ["models"] else path, text)
    if not path or not path[-1].lower().endswith(".gguf"):
        raise UsageError(f"{text[:200]} names no .gguf file.", hint="Give the address of the file itself, or a hub's id.")
    return Asked("address", text, exact=True, source="address")


def _of_hub(source: SourceName, path: list[str], text: str) -> Asked:
    """hf.co/ORG/MODEL[:LEVEL], …/tree/REVISION, …/blob/REVISION/FILE, …/resolve/REVISION/FILE; ModelScope's …/files too."""
    match = _REPOSITORY.fullmatch("/".join(path[:2]))
    if not match:
        raise UsageError(f"{text[:200]} names no model.", hint="An address looks like https://huggingface.co/Qwen/Qwen2-7B-Instruct.")
    level = (match["level"] or "").lower()
    match path[2:]:
        case [] | ["files" | "summary" | "discussions", *_]:
            return of_repository(match["id"], level=level, source=source)
        case ["tree", revision, *_]:
            return of_repository(match["id"], level=level, source=source, revision=revision)
        case ["blob" | "resolve" | "raw", revision, *file] if file and file[-1].lower().endswith(".gguf"):
            return of_repository(match["id"], source=source, revision=revision, file="/".join(file))
    raise UsageError(f"{text[:200]} is neither a model's page nor a .gguf file.", hint=f"`qwen2-local pull {match['id']}`, say.")
