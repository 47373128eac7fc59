"""The picture of match scores."""

import numpy as np

from headshare_jax.errors import HeadshareError
from headshare_jax.report.picture import Picture, drawn
from headshare_jax.sharing.scores import MatchResult


@drawn
def draw_scores(result: MatchResult) -> Picture:
    """The score of every (receiver, donor) pair, with each receiver's best donor marked.

    Raises:
      HeadshareError: the result holds best donors only.
    """
    if result.scores is None:
        raise HeadshareError("This match result holds only the best donors; match again to draw all pairs.")
    layers, units = result.value.shape
    scores = np.where(np.isfinite(result.scores), result.scores, np.nan)
    low, high, colours = float(np.nanmin(scores)), float(np.nanmax(scores)), "cividis"
    if result.match != "functional":
        # Cosines, which have a middle.
        high = max(-low, high)
        low, colours = -high, "RdBu_r"
    picture = Picture(5.6, 5.2, layout="constrained")
    axes = picture.figure.add_subplot()
    image = axes.imshow(scores, cmap=colours, vmin=low, vmax=high, interpolation="none")
    has_donor = np.isfinite(result.value.ravel())
    size = float(np.clip(100 / len(scores), 1.2, 5))
    places = result.donor.ravel()[has_donor], np.flatnonzero(has_donor)
    axes.plot(*places, "o", color="black", markersize=size, markeredgewidth=0, label="best donor")
    axes.set(xlabel="donor's layer", ylabel="receiver's layer")
    shown = np.arange(0, layers, -(-layers // 12))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_ticks(shown * units + (units - 1) / 2, [str(layer) for layer in shown])
    # Legend and scale lie in the half that no pair fills.
    axes.legend(loc="upper right", bbox_to_anchor=(1, 0.86), markerscale=5 / size, handletextpad=0.2)
    bar = picture.figure.colorbar(image, cax=axes.inset_axes((0.5, 0.92, 0.46, 0.025)), orientation="horizontal")
    assert bar.solids is not None
    bar.solids.set_rasterized(True)
    bar.outline.set_visible(False)
    bar.set_ticks([low, (low + high) / 2, high], labels=[f"{value:.2g}" for value in (low, (low + high) / 2, high)])
    bar.ax.set_title(f"score ({result.match})", loc="center")
    return picture
