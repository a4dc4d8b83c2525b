"""What a person chose, as plain data, and the TOML file that it lies in.

The file is the person's own: only what was changed in the app is changed in it, and comments, order, and keys that this program does not
know stay as they are. What is wrong in it is left out, with a note, and never stops the app.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from qwen2_local import files
from qwen2_local.sanitize import clean_line
from qwen2_tui.fields import CHAT

_MOST_BYTES = 1_000_000
_LONGEST_NAME = 60


@dataclass(frozen=True, slots=True)
class ChatSettings:
    """How replies are asked for. None: the model's own; `fields.CHAT` says what each is."""

    system: str | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    seed: int | None = None
    max_tokens: int | None = None
    lookup: bool = False

    def wishes(self) -> dict[str, Any]:
        """The options of a reply (`options.Options`): all that was chosen but the system prompt, with which a chat begins."""
        given = {one.name: getattr(self, one.name) for one in CHAT if one.name != "system"}
        return {name: value for name, value in given.items() if value is not None and value is not False}


@dataclass(frozen=True, slots=True)
class ModelSettings:
    """Which model, and how it is loaded. None: as it comes; `fields.MODEL` says what each is."""

    model: str | None = None
    backend: str | None = None
    context: int | None = None
    kv_bits: int | None = None
    draft: str | None = None


@dataclass(frozen=True, slots=True)
class Settings:
    """All of them. presets: by their names. keys: keys by the ids of `keys.TABLE`. sidebar: is the list of chats shown?"""

    chat: ChatSettings = ChatSettings()
    model: ModelSettings = ModelSettings()
    presets: Mapping[str, ChatSettings] = field(default_factory=dict)
    theme: str = "dark"
    keys: Mapping[str, str] = field(default_factory=dict)
    sidebar: bool = True


def differing(chat: ChatSettings, base: ChatSettings) -> dict[str, Any]:
    """What a chat has otherwise than every new one, for `ChatStore.keep_options`."""
    return {one.name: value for one in CHAT if (value := getattr(chat, one.name)) != getattr(base, one.name)}


def with_options(base: ChatSettings, options: Mapping[str, Any]) -> ChatSettings:
    """The reverse. Whatever is no setting, or cannot be, is as in `base`."""
    given = [(one, options[one.name]) for one in CHAT if one.name in options]
    return replace(base, **{one.name: value for one, value in given if (value is None and one.unset) or not one.problem(value)})


def applied(preset: ChatSettings, base: ChatSettings) -> ChatSettings:
    """What a chat has with a preset: what the preset sets, and the rest as every new chat."""
    return replace(base, **{one.name: value for one in CHAT if (value := getattr(preset, one.name)) is not None and value is not False})


def preset_problem(name: str) -> str:
    """What is wrong with a preset's name, in a sentence; "" if nothing is."""
    if not name.strip():
        return "A preset needs a name."
    if len(name) > _LONGEST_NAME or clean_line(name) != name or name != name.strip():
        return f"A preset's name is one line of at most {_LONGEST_NAME} characters."
    return ""


class SettingsFile:
    """The file at `path`; it need not be there."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._base: Settings | None = None

    def read(self) -> tuple[Settings, tuple[str, ...]]:
        """What it says, and notes on what is wrong with it, each with its line. Never raises."""
        from qwen2_tui.settings_read import understood

        data, notes = self._bytes()
        if data is None:
            settings = Settings()
        else:
            settings, notes = understood(data, self.path.name)
        self._base = settings
        return settings, notes

    def write(self, settings: Settings) -> None:
        """Brings into the file what is otherwise than when it was last read or written; the rest of it stays. Atomic, mode 0600.

        A file that is no TOML is kept beside it, as settings.toml.bad. Raises OSError, and DoesNotFit on a full disk.
        """
        from qwen2_tui import settings_edit

        base = self._base if self._base is not None else self.read()[0]
        place = self.path.resolve()  # a link stays one
        place.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        data, notes = self._bytes()
        if data is None and not notes:
            text = settings_edit.fresh(settings)
        else:
            edited = None if data is None else settings_edit.edited(data, base, settings)
            if edited is None:
                _keep_aside(place)
            text = settings_edit.fresh(settings) if edited is None else edited
        if data is None or text.encode() != data:
            files.write_atomic(place, text)
        self._base = settings

    def _bytes(self) -> tuple[bytes | None, tuple[str, ...]]:
        """What is in the file; None if it is not there, or cannot be read: then a note says why."""
        try:
            if not self.path.exists():
                return None, ()
            if not self.path.is_file():
                return None, (f"{self.path.name} is no file: settings are those at the beginning.",)
            with self.path.open("rb") as file:
                data = file.read(_MOST_BYTES + 1)
        except OSError as error:
            return None, (f"{self.path.name} cannot be read ({error.strerror}): settings are those at the beginning.",)
        if len(data) > _MOST_BYTES:
            return None, (f"{self.path.name} has more than {_MOST_BYTES:,} bytes: settings are those at the beginning.",)
        return data, ()


def _keep_aside(place: Path) -> None:
    """Gives a file that could not be used another name, under which it stays."""
    names = (f"{place.name}.bad", *(f"{place.name}.bad-{number}" for number in range(2, 1000)))
    aside = next(path for name in names if not (path := place.with_name(name)).exists())
    place.rename(aside)
