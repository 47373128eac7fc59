"""Colours, symbols and type of all pictures."""

from typing import Any

INK, FAINT, GRID, STRIP = "#222222", "#c9c9c9", "#e9e9e9", "#f3f3f3"
# Colours that readers with any kind of colour vision can tell apart, dark enough to write in; each with its own symbol.
SERIES = (
    ("#0072b2", "o"),
    ("#c24e00", "s"),
    ("#00795a", "D"),
    ("#a3487f", "^"),
    ("#5b4fa0", "*"),
    ("#7a6200", "P"),
    ("#8c1a1a", "h"),
)
GREY = ("#6b6b6b", "X")
BASELINES = {"random": GREY, "random-refit": ("#8a6d5a", "v")}
DONOR, RECEIVER, SLIM = SERIES[:3]

# Matplotlib's settings while a picture is drawn and written.
LOOK: dict[Any, Any] = {
    "font.size": 11,
    "font.sans-serif": ["DejaVu Sans"],
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    **dict.fromkeys(("text.color", "axes.labelcolor", "xtick.labelcolor", "ytick.labelcolor"), INK),
    **dict.fromkeys(("axes.edgecolor", "xtick.color", "ytick.color"), FAINT),
    **dict.fromkeys(("axes.spines.top", "axes.spines.right", "legend.frameon"), False),
    "axes.axisbelow": True,
    "grid.color": GRID,
    "savefig.dpi": 150,
    # Letters stay letters: small files that can be searched.
    "svg.fonttype": "none",
}
