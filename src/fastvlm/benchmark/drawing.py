"""A drawing of lines, dots and words that becomes a PNG or an SVG."""

from pathlib import Path
from typing import Any, Final, Literal
from xml.sax.saxutils import escape, quoteattr

from PIL import Image, ImageDraw, ImageFont

Anchor = Literal["start", "middle", "end"]
Place = tuple[float, float]
_PILLOW_ANCHORS: Final = {"start": "ls", "middle": "ms", "end": "rs"}
_FINE: Final = 2  # pixels of the PNG a unit, so that it is sharp on fine screens
_SCALE: Final = 2 * _FINE  # at which it is drawn; halved, its slanted lines are smooth


class Drawing:
    """A white sheet; units are pixels of a plain screen, from the top left corner."""

    def __init__(self, width: int, height: int) -> None:
        self.width, self.height = width, height
        self._shapes: list[tuple[str, dict[str, Any]]] = []

    def line(self, points: list[Place], colour: str, width: float = 1.0) -> None:
        """Join points by straight lines."""
        self._shapes.append(("line", {"points": points, "colour": colour, "width": width}))

    def dot(self, place: Place, radius: float, colour: str) -> None:
        """Fill a circle."""
        self._shapes.append(("dot", {"place": place, "radius": radius, "colour": colour}))

    def text(
        self, place: Place, words: str, *, size: int = 13, colour: str = "#222222", anchor: Anchor = "start"
    ) -> None:
        """Write words on a base line that begins, has its middle, or ends at a place."""
        self._shapes.append(
            ("text", {"place": place, "words": words, "size": size, "colour": colour, "anchor": anchor})
        )

    def write_png(self, path: Path) -> None:
        """Write it as pixels."""
        image = Image.new("RGB", (self.width * _SCALE, self.height * _SCALE), "white")
        draw = ImageDraw.Draw(image)
        for kind, shape in self._shapes:
            if kind == "line":
                points = [(x * _SCALE, y * _SCALE) for x, y in shape["points"]]
                draw.line(points, fill=shape["colour"], width=max(1, round(shape["width"] * _SCALE)), joint="curve")
            elif kind == "dot":
                (x, y), radius = shape["place"], shape["radius"]
                box = [(x - radius) * _SCALE, (y - radius) * _SCALE, (x + radius) * _SCALE, (y + radius) * _SCALE]
                draw.ellipse(box, fill=shape["colour"])
            else:
                font = ImageFont.load_default(shape["size"] * _SCALE)
                place = (shape["place"][0] * _SCALE, shape["place"][1] * _SCALE)
                anchor = _PILLOW_ANCHORS[shape["anchor"]]
                draw.text(place, shape["words"], fill=shape["colour"], font=font, anchor=anchor)
        image = image.resize((self.width * _FINE, self.height * _FINE), Image.Resampling.BOX)
        image.save(path, format="PNG", optimize=True)

    def write_svg(self, path: Path) -> None:
        """Write it as shapes."""
        lines = [
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{self.width}" height="{self.height}">',
            "<style>text { font-family: Helvetica, Arial, sans-serif; }</style>",
            f'<rect width="{self.width}" height="{self.height}" fill="white"/>',
        ]
        for kind, shape in self._shapes:
            colour = quoteattr(shape["colour"])
            if kind == "line":
                points = " ".join(f"{x:.1f},{y:.1f}" for x, y in shape["points"])
                lines.append(
                    f'<polyline points="{points}" fill="none" stroke={colour} stroke-width="{shape["width"]}"/>'
                )
                continue
            x, y = shape["place"]
            if kind == "dot":
                lines.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{shape["radius"]}" fill={colour}/>')
            else:
                lines.append(
                    f'<text x="{x:.1f}" y="{y:.1f}" font-size="{shape["size"]}" fill={colour} '
                    f'text-anchor="{shape["anchor"]}">{escape(shape["words"])}</text>'
                )
        path.write_text("\n".join([*lines, "</svg>"]) + "\n", encoding="utf-8")
