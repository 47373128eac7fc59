"""A picture: a figure that is written as a file or as an SVG element, and what its points say."""

import io
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from headshare_jax.errors import HeadshareError
from headshare_jax.report.style import LOOK

FORMATS = (".png", ".svg", ".pdf")
# By this our pictures are told from others before one is replaced.
_MARK = "headshare-jax"
_NAMESPACE = "http://www.w3.org/2000/svg"

# A function that draws a picture is decorated with it.
drawn = rc_context(LOOK)


class Picture:
    """A figure of a size in inches. The same data give the same bytes."""

    def __init__(self, width: float, height: float, **settings: Any):
        self.figure = Figure(figsize=(width, height), **settings)
        self._titles: dict[str, Sequence[str]] = {}

    def points(self, axes: Axes, x: Any, y: Any, titles: Sequence[str] = (), **style: Any) -> None:
        """Plots points, each with a text that an SVG shows to who points at it."""
        name = f"points-{len(self._titles)}"
        axes.plot(x, y, gid=name, **style)
        self._titles[name] = titles

    def save(self, path: Path) -> None:
        """Writes the picture; raises HeadshareError if the file's ending is none of `FORMATS`."""
        check_name(path)
        if path.suffix.lower() == ".svg":
            path.write_text(f"<!-- {_MARK} -->\n{self.svg('picture')}\n", encoding="utf-8")
            return
        metadata = {"Creator": _MARK, "CreationDate": None} if path.suffix.lower() == ".pdf" else {"Software": _MARK}
        with rc_context(LOOK):
            self.figure.savefig(path, metadata=metadata)

    def svg(self, salt: str) -> str:
        """The picture as an SVG element; a salt of its own keeps its ids apart from others' in the same page."""
        with rc_context(LOOK | {"svg.hashsalt": salt}), io.StringIO() as file:
            self.figure.savefig(file, format="svg", metadata={"Date": None})
            text = file.getvalue()
        # Without namespaces, which a page does not need.
        text = text[text.index("<svg") :].replace(f' xmlns="{_NAMESPACE}"', "").replace("xlink:href", "href")
        return self._tidy(ElementTree.fromstring(text), used=set(re.findall(r'(?:href="|url\()#(\w+)', text)))

    def _tidy(self, root: ElementTree.Element, used: set[str]) -> str:
        """Adds titles; removes what would hold for the whole page, and ids that nothing refers to."""
        for element in list(root):
            if element.tag == "metadata" or element.find("style") is not None:
                root.remove(element)
        for element in root.iter():
            name = element.get("id", "")
            for point, title in zip(element.iter("use"), self._titles.get(name, ()), strict=False):
                ElementTree.SubElement(point, "title").text = title
            if name and name not in used:
                del element.attrib["id"]
            element.text = (element.text or "").strip() or None
            element.tail = "\n"
        root.attrib |= {"xmlns": _NAMESPACE, "style": "stroke-linejoin: round; stroke-linecap: butt"}
        return ElementTree.tostring(root, encoding="unicode").strip()


def check_name(path: Path) -> None:
    """Raises HeadshareError unless the file's ending is one of `FORMATS`."""
    if path.suffix.lower() not in FORMATS:
        raise HeadshareError(f"A picture's name must end in {', '.join(FORMATS)}, unlike {path.name}.")
