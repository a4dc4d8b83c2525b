"""Two themes of our own: calm, with contrast enough (WCAG AA) that they stay readable where a terminal has 256 or 16 colours only."""

from __future__ import annotations

from textual.theme import Theme

DARK = Theme(
    name="qwen2-dark",
    primary="#7aa2c8",
    secondary="#8fb8a8",
    accent="#c9a26d",
    foreground="#d8dce2",
    background="#14171c",
    surface="#1a1e25",
    panel="#232933",
    success="#8fbf7f",
    warning="#d9a95b",
    error="#e07a74",
    dark=True,
    variables={"footer-key-foreground": "#c9a26d", "footer-description-foreground": "#a9b1bd", "border": "#3a4350", "border-blurred": "#2b323d"},
)

LIGHT = Theme(
    name="qwen2-light",
    primary="#2b5f8f",
    secondary="#2f6b5a",
    accent="#8a5a14",
    foreground="#1f242b",
    background="#fbfaf7",
    surface="#f3f1ec",
    panel="#e7e4dc",
    success="#2e6b27",
    warning="#875208",
    error="#a8322c",
    dark=False,
    variables={"footer-key-foreground": "#8a5a14", "footer-description-foreground": "#4a515b", "border": "#b9b4a8", "border-blurred": "#d3cfc5"},
)

OURS = {"dark": DARK.name, "light": LIGHT.name}
"""Short names, as settings may say them."""


def theme_named(name: str, known: object) -> str:
    """The theme that a person means by `name`; ours, dark, where there is none of that name. known: the names that there are."""
    name = OURS.get(name, name)
    return name if isinstance(known, dict) and name in known else DARK.name
