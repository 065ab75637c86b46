"""Matplotlib's SVG documents as elements of a page: unique ids, the page's own text colour, no size or fonts of their own."""

from __future__ import annotations

import io
import re
import xml.etree.ElementTree as ET

from matplotlib.figure import Figure

INK = "#010203"  # stands for the page's text colour while matplotlib draws


def svg(figure: Figure, name: str, title: str) -> str:
    """The figure as an `svg` element that can stand in a page beside others."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    return inline(buffer.getvalue(), name, title)


def inline(text: str, name: str, title: str) -> str:
    """An SVG document of matplotlib's as an element of an HTML page.

    Ids that something refers to get `name` before them, the others go; so do the document's own style sheet (it would
    rule the whole page), its size (the page's style decides) and its fonts. `INK` becomes the page's text colour.
    """
    root = ET.fromstring(text)  # nosec B314 # matplotlib's own, from this process
    for parent in root.iter():
        for child in [c for c in parent if c.tag.rpartition("}")[2] in ("metadata", "style")]:
            parent.remove(child)
    used = set(re.findall(r'href="#([^"]+)"|url\(#([^)]+)\)', text))
    targets = {one or other for one, other in used}
    for element in root.iter():
        element.tag = element.tag.rpartition("}")[2]
        attributes = {key.rpartition("}")[2]: value for key, value in element.attrib.items()}
        if attributes.get("id") in targets:
            attributes["id"] = f"{name}-{attributes['id']}"
        else:
            attributes.pop("id", None)
        if attributes.get("href", "").startswith("#"):
            attributes["href"] = f"#{name}-{attributes['href'][1:]}"
        if "clip-path" in attributes:
            attributes["clip-path"] = attributes["clip-path"].replace("url(#", f"url(#{name}-")
        if "style" in attributes:
            attributes["style"] = _style(attributes["style"])
        if "d" in attributes:
            attributes["d"] = re.sub(r"-?\d+\.\d{3,}", lambda m: f"{float(m[0]):.2f}", attributes["d"])
        element.attrib.clear()
        element.attrib.update(attributes)
    root.attrib.clear()
    root.attrib.update({"viewBox": _view(text), "role": "img", "aria-labelledby": f"{name}-title"})
    heading = ET.Element("title", {"id": f"{name}-title"})
    heading.text = title
    root.insert(0, heading)
    return ET.tostring(root, encoding="unicode")


def _style(style: str) -> str:
    style = style.replace(INK, "currentColor")
    return re.sub(r"font: (?:(\d+) )?([\d.]+)px [^;]*", lambda m: f"font-size: {m[2]}px", style)


def _view(text: str) -> str:
    view = re.search(r'viewBox="([-\d. ]+)"', text)
    assert view is not None, "matplotlib writes a viewBox"
    return view[1]
