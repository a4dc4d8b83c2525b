"""Keys of a field that is typed in, in the order in which they were pressed."""

from __future__ import annotations

from textual import events
from textual.widget import Widget


async def in_turn(widget: Widget, event: events.Key) -> None:
    """For `on_key`: does what the widget's own bindings say of the key, here and now.

    Textual takes letters at once, and bindings only when the key has gone all the way up: of keys that come together, as over a slow line, the
    letters would overtake a backspace that was pressed before them.
    """
    bound = None if event.is_printable else widget.screen.active_bindings.get(event.key)
    if bound is not None and bound.node is widget and await widget.app.run_action(bound.binding.action, widget):
        event.stop()
        event.prevent_default()
