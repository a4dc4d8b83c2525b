"""What changed in the app. Posted to every open screen, so that none has to ask."""

from __future__ import annotations

from typing import TYPE_CHECKING

from textual.message import Message

if TYPE_CHECKING:
    from qwen2_tui.host import HostState
    from qwen2_tui.jobs import Job
    from qwen2_tui.settings import Settings


class HostChanged(Message, bubble=False):
    """The model is loading, is there, or failed."""

    def __init__(self, state: HostState) -> None:
        super().__init__()
        self.state = state


class SettingsChanged(Message, bubble=False):
    """A person changed the settings."""

    def __init__(self, settings: Settings) -> None:
        super().__init__()
        self.settings = settings


class JobChanged(Message, bubble=False):
    """A fetch or a verification went on."""

    def __init__(self, job: Job) -> None:
        super().__init__()
        self.job = job


class ChatsChanged(Message, bubble=False):
    """Saved chats were renamed, pinned or deleted. gone: they are in the trash; back: they are out of it again."""

    def __init__(self, gone: frozenset[int] = frozenset(), back: frozenset[int] = frozenset()) -> None:
        super().__init__()
        self.gone, self.back = gone, back
