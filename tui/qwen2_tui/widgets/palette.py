"""How each ink looks: component classes, so that themes and style sheets have their say."""

from __future__ import annotations

from rich.style import Style
from textual.widget import Widget

from qwen2_tui.markdown.ink import ADDRESS, BOLD, CODE, FLAGS, ITALIC, LINK, STRIKE, Ink, Kind

COMPONENTS: dict[Kind | str, str] = {kind: f"transcript--{kind.name.lower()}" for kind in Kind}
COMPONENTS |= {name: f"transcript--{name}" for name in ("inline", "link", "address", "marked", "focused", "hint")}

CSS = """
Window {
    background: $background;
    color: $foreground;
    overflow-x: hidden;
    overflow-y: scroll;
    scrollbar-size-vertical: 1;
    scrollbar-background: $background;
    scrollbar-background-hover: $background;
    scrollbar-background-active: $background;
    scrollbar-color: $panel;
    scrollbar-color-hover: $primary;
    scrollbar-color-active: $primary;

    & > .transcript--text { color: $foreground; }
    & > .transcript--quiet { color: $foreground 60%; }
    & > .transcript--line { color: $foreground 30%; }
    & > .transcript--heading { color: $primary; }
    & > .transcript--quote { color: $foreground 80%; }
    & > .transcript--mark { color: $accent; }
    & > .transcript--user { color: $secondary; }
    & > .transcript--model { color: $foreground 60%; }
    & > .transcript--code { color: $foreground; background: $surface; }
    & > .transcript--label { color: $foreground 60%; background: $surface; }
    & > .transcript--edge { color: $foreground; background: $surface; }
    & > .transcript--keyword { color: $primary; background: $surface; }
    & > .transcript--name { color: $accent; background: $surface; }
    & > .transcript--string { color: $success; background: $surface; }
    & > .transcript--number { color: $warning; background: $surface; }
    & > .transcript--comment { color: $foreground 60%; background: $surface; text-style: italic; }
    & > .transcript--builtin { color: $secondary; background: $surface; }
    & > .transcript--added { color: $success; background: $surface; }
    & > .transcript--removed { color: $error; background: $surface; }
    & > .transcript--inline { color: $accent; background: $surface; }
    & > .transcript--link { color: $primary; text-style: underline; }
    & > .transcript--address { color: $foreground 60%; }
    & > .transcript--marked { color: $accent; }
    & > .transcript--focused { color: $accent; background: $surface; }
    & > .transcript--hint { color: $background; background: $primary; }
}
"""


class Palette:
    """The styles of a widget's inks, as its theme has them now."""

    def __init__(self, widget: Widget) -> None:
        self._bases = {key: widget.get_component_rich_style(name) for key, name in COMPONENTS.items()}
        self._styles: dict[Ink, Style] = {}
        self.blank = self._bases[Kind.TEXT]
        self.selection = widget.screen.get_component_rich_style("screen--selection")

    def named(self, name: str) -> Style:
        """A style that no text has by itself: "marked", "focused", "hint"."""
        return self._bases[name]

    def __getitem__(self, ink: Ink) -> Style:
        style = self._styles.get(ink)
        if style is None:
            style = self._styles[ink] = self._mixed(ink)
        return style

    def _mixed(self, ink: Ink) -> Style:
        kind, flags = divmod(ink, FLAGS)
        style = self._bases[Kind(kind)]
        for flag, name in ((ADDRESS, "address"), (LINK, "link"), (CODE, "inline")):
            if flags & flag:
                style += self._bases[name]
        return style + Style(bold=bool(flags & BOLD) or None, italic=bool(flags & ITALIC) or None, strike=bool(flags & STRIKE) or None)
