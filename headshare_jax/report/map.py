"""The picture of a sharing map."""

import hashlib
import textwrap

import numpy as np
from matplotlib.axes import Axes
from matplotlib.patches import PathPatch
from matplotlib.path import Path as Curve
from matplotlib.ticker import MultipleLocator

from headshare_jax.report.picture import Picture, drawn
from headshare_jax.report.style import DONOR, FAINT, GREY, RECEIVER, SLIM
from headshare_jax.sharing.map import SharingMap


def map_svg(sharing: SharingMap) -> str:
    """The map's picture as an SVG element, with ids that no other map's has."""
    return draw_map(sharing).svg(hashlib.sha256(sharing.to_json().encode()).hexdigest())


@drawn
def draw_map(sharing: SharingMap) -> Picture:
    """Every unit, layers from left to right, and a line from each donor to each of its receivers.

    Where some unit is slim, what is kept of each lies below.
    """
    layers, units = sharing.donor.shape
    layer, unit = np.divmod(np.arange(layers * units), units)
    each = (sharing.donor, sharing.receives, sharing.dropped, sharing.slim)
    donor, receives, dropped, slim = (of_units.ravel() for of_units in each)
    gives = np.isin(np.arange(layers * units), donor[receives])
    kinds = [
        ("own weights", ~receives & ~gives & ~dropped & ~slim, FAINT, "o", 4.5),
        ("slim", slim, *SLIM, 5.5),
        ("donor", gives, *DONOR, 7),
        ("receiver", receives, *RECEIVER, 6),
        ("dropped", dropped, *GREY, 6.5),
    ]
    kinds = [kind for kind in kinds if kind[1].any()]
    width = max(3.7, 0.8 + 0.225 * layers)
    title = textwrap.fill(sharing.summary(), int(12 * width))
    lines = title.count("\n") + 1
    strips = _strips(sharing)
    height = 0.25 * units
    picture = Picture(width, 1.1 + 0.17 * lines + height + (0.6 + height) * len(strips), layout="constrained")
    axes, *below = picture.figure.subplots(1 + len(strips), 1, squeeze=False).ravel()
    for strip, (title_below, kept_lu) in zip(below, strips.items(), strict=True):
        image = strip.imshow(kept_lu.T, cmap="cividis", vmin=0, vmax=1, aspect="auto", interpolation="none")
        _of_units(strip, layers, units, title_below)
    if strips:
        bar = picture.figure.colorbar(image, ax=below, fraction=0.06, ticks=[0, 0.5, 1], format="{x:.0%}")
        assert bar.solids is not None
        bar.solids.set_rasterized(True)
        bar.outline.set_visible(False)
    axes.add_patch(_arcs(layer, unit, donor, np.flatnonzero(receives)))
    told = _told(sharing)
    for name, chosen, colour, symbol, size in kinds:
        picture.points(
            axes, layer[chosen], unit[chosen], [told[flat] for flat in np.flatnonzero(chosen)], label=name,
            linestyle="none", color=colour, marker=symbol, markersize=size, markeredgewidth=0, clip_on=False,
        )  # fmt: skip
    _of_units(axes, layers, units, title)
    axes.set_ylim(units - 0.4, -0.9)
    picture.figure.legend(
        loc="outside lower left",
        ncols=len(kinds) if width > 5 else 2,
        handletextpad=0.2,
        columnspacing=1.2,
        borderaxespad=0.1,
    )
    return picture


def _of_units(axes: Axes, layers: int, units: int, title: str) -> None:
    """Labels axes of which layers lie along one side and units along the other."""
    axes.set(title=title, xlabel="layer", ylabel="unit", xlim=(-0.7, layers - 0.3))
    axes.xaxis.set_major_locator(MultipleLocator(-(-layers // 16)))
    axes.yaxis.set_major_locator(MultipleLocator(-(-units // 8)))


def _strips(sharing: SharingMap) -> dict[str, np.ndarray]:
    """What part is kept of each unit, [L, U], by what it is of; nothing where no unit is slim."""
    if sharing.widths is None:
        return {}
    stored_lu = ~sharing.dropped
    return {
        "values and outputs kept": stored_lu * sharing.widths.vo.mean(axis=2),
        "queries and keys kept": stored_lu * sharing.widths.qk.mean(axis=2),
    }


def _arcs(layer: np.ndarray, unit: np.ndarray, donor: np.ndarray, receivers: np.ndarray) -> PathPatch:
    """Lines from donors to receivers, bent so that those along one row can be seen."""
    start, stop = (np.stack([layer[ends], unit[ends]], axis=1) for ends in (donor[receivers], receivers))
    bend = np.minimum(0.4 + 0.06 * np.abs(stop - start)[:, 0], 1.2)
    middle = (start + stop) / 2 - np.stack([np.zeros_like(bend), bend], axis=1)
    corners = np.stack([start, middle, stop], axis=1).reshape(-1, 2)
    codes = np.tile([Curve.MOVETO, Curve.CURVE3, Curve.CURVE3], len(receivers))
    return PathPatch(Curve(corners, codes), fill=False, edgecolor=DONOR[0], alpha=0.4, linewidth=0.9, clip_on=False)


def _told(sharing: SharingMap) -> list[str]:
    """A sentence for every unit."""
    assert sharing.unit_tie is not None
    layers, units = sharing.donor.shape
    uses = np.bincount(sharing.donor.ravel()[sharing.receivers], minlength=layers * units)
    told = []
    for flat in range(layers * units):
        text = f"layer {flat // units}, unit {flat % units}"
        if sharing.dropped.flat[flat]:
            text += ": dropped"
        elif sharing.receives.flat[flat]:
            layer, unit = divmod(int(sharing.donor.flat[flat]), units)
            score = sharing.score.flat[flat]
            text += f" uses {sharing.unit_tie.flat[flat]} of layer {layer}, unit {unit}"
            text += "" if np.isnan(score) else f", score {score:.4f}"
        elif sharing.widths is not None and sharing.slim.flat[flat]:
            rank, pairs = sharing.widths.rank.flat[flat], sharing.widths.pairs[divmod(flat, units)]
            text += f": slim, {rank} of {sharing.widths.head_dim} values and {pairs.sum()} of {len(pairs)} pairs kept"
        else:
            text += f": donor of {uses[flat]}" if uses[flat] else ": its own weights"
        told.append(text)
    return told
