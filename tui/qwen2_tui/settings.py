"""What a person chose, as plain data, and the TOML file it lies in."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True, slots=True)
class ChatSettings:
    """How replies are asked for. None: the model's own."""

    system: str | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    seed: int | None = None
    max_tokens: int | None = None
    lookup: bool = False


@dataclass(frozen=True, slots=True)
class ModelSettings:
    """Which model, and how it is loaded. None: as it comes."""

    model: str | None = None
    backend: str | None = None
    context: int | None = None
    kv_bits: int | None = None
    draft: str | None = None


@dataclass(frozen=True, slots=True)
class Settings:
    """All of them."""

    chat: ChatSettings = ChatSettings()
    model: ModelSettings = ModelSettings()
    presets: Mapping[str, ChatSettings] = field(default_factory=dict)
    theme: str = "dark"
    keys: Mapping[str, str] = field(default_factory=dict)
    sidebar: bool = True


class SettingsFile:
    """The file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self) -> tuple[Settings, tuple[str, ...]]:
        """What it says, and notes on what is wrong with it."""
        return Settings(), ()

    def write(self, settings: Settings) -> None:
        """Not yet."""
