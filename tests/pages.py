"""The demo's report, read as a browser reads it."""

import base64
import io
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree


class Page(HTMLParser):
    """The text of a page, and its pictures by what they show, decoded: Pillow's images, and the roots of SVGs."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.pictures: dict[str, Any] = {}
        self.texts: list[str] = []
        self.open: list[str] = []
        self.feed((folder / "report.html").read_text(encoding="utf-8"))
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        if tag == "img":
            assert given["alt"] not in self.pictures
            self.pictures[given["alt"]] = decoded(given["src"])
        if tag not in ("img", "meta"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    @property
    def text(self) -> str:
        return "".join(self.texts)


def decoded(address: str) -> Any:
    from PIL import Image

    kind, content = address.split(";base64,")
    content = base64.b64decode(content, validate=True)
    if kind == "data:image/svg+xml":
        return ElementTree.fromstring(content)
    assert kind == "data:image/jpeg"
    image = Image.open(io.BytesIO(content))
    image.load()
    return image
