"""The numbers of the chat: speed, memory, context; and the warning before a message would not fit."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qwen2_local.errors import ContextOverflow
from qwen2_tui.conversation import Measure
from qwen2_tui.live import Progress
from qwen2_tui.widgets.limit import Offer, of_context
from qwen2_tui.widgets.statusline import Numbers

if TYPE_CHECKING:
    from qwen2_tui.screens.chat import ChatScreen

_MEMORY_S = 2.0


class Gauges:
    """For the UI thread."""

    def __init__(self, screen: ChatScreen) -> None:
        self._screen = screen
        self._measure: Measure | None = None
        self.last: Progress | None = None
        """Of the reply before, which is over."""
        screen.set_interval(_MEMORY_S, self.show)

    def forget(self) -> None:
        """Another conversation is shown: what is known of the one before is nothing to it."""
        self.last = self._measure = None

    def show(self) -> None:
        """As things are now."""
        screen = self._screen
        host, live, measure = screen.qwen.host, screen.session.live, self._measure
        progress = live.progress() if live is not None else self.last
        if live is not None and measure is not None and progress is not None and progress.prompt:
            measure = Measure(progress.prompt + progress.written, progress.cached, measure.most)
        # Of a crash the conversation tells already.
        state = host.state
        words = state.words if state.phase == "loading" or (state.phase == "failed" and not state.crashed) else ""
        screen.status.show(Numbers(words, progress, host.memory(), measure))

    def measured(self, measure: Measure) -> None:
        """The context was counted."""
        self._measure = measure
        offers = self._screen.offers
        offer = self._offer(measure)
        if offer is None:
            offers.hide("context")
        elif offers.offer is None or offers.offer.kind in ("context", "broken", "last"):
            offers.show(offer)
        self.show()

    def refuses(self, text: str) -> bool:
        """Is it known that `text` does not fit? Then the choices are shown."""
        measure = self._measure
        if measure is None or measure.left > 0 or self._screen.writing.counted != text:
            return False
        self._screen.offers.show(self._offer(measure))
        return True

    def overflowed(self, error: ContextOverflow) -> None:
        """A message was refused as too long."""
        offer = self._offer(Measure(2, 0, 1))
        assert offer is not None
        self._screen.offers.show(Offer("context", error.what, offer.choices))

    def _offer(self, measure: Measure) -> Offer | None:
        conversation = self._screen.session.conversation
        turns = sum(message.role == "user" for message in conversation.messages)
        bounded = self._screen.qwen.host.state.wish.context is not None
        return of_context(measure, turns=turns, shortened=conversation.overflow != "error", bounded=bounded)
