"""The colours of the pictures: every figure is drawn once for light pages and once for dark ones."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Theme:
    """Colours of one page. Kept and removed differ in hue *and* lightness, for print and for
    colour-blind readers (after Okabe and Ito's palette).

    Attributes:
        ramp: matplotlib colour map for shares from 0 to 1; its low end is close to the page.
    """

    name: str
    page: str
    ink: str
    faint: str
    kept: str
    removed: str
    accent: str
    ramp: str

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Everything drawn in here has this theme."""
        import matplotlib

        settings: dict[Any, Any] = {
            "figure.facecolor": self.page, "savefig.facecolor": self.page,
            "axes.facecolor": self.page, "axes.edgecolor": self.faint,
            "axes.labelcolor": self.ink, "axes.titlecolor": self.ink, "text.color": self.ink,
            "xtick.color": self.faint, "ytick.color": self.faint,
            "xtick.labelcolor": self.ink, "ytick.labelcolor": self.ink,
            "grid.color": self.faint, "grid.alpha": 0.25, "legend.frameon": False,
            "axes.spines.top": False, "axes.spines.right": False,
            "text.parse_math": False,  # names of files and layers may hold dollars
            "axes.titlesize": "medium", "axes.titlelocation": "left", "font.size": 10,
        }  # fmt: skip
        with matplotlib.rc_context(settings):
            yield


LIGHT = Theme("light", "#ffffff", "#1f2328", "#7d8590", "#0072B2", "#D55E00", "#6e7781", "Blues")
DARK = Theme("dark", "#14181d", "#e6edf3", "#8b949e", "#56B4E9", "#F0953F", "#9aa4af", "viridis")
THEMES = (LIGHT, DARK)
