"""The object pictures of the drawn data set: a pen and one function of strokes for each class."""

from __future__ import annotations

import colorsys
import math
from collections.abc import Callable, Sequence

import numpy as np
from PIL import Image, ImageDraw

Point = tuple[float, float]
Colour = tuple[int, int, int]

_OVERSAMPLE = 2  # drawn larger and reduced: smooth edges
_DARK: Colour = (35, 35, 40)


class Pen:
    """Draws in object coordinates (-1 to 1, y down) through an affine map onto a transparent layer."""

    def __init__(self, size: tuple[int, int], matrix: np.ndarray, centre: Point, rng: np.random.Generator) -> None:
        self.layer = Image.new("RGBA", (size[0] * _OVERSAMPLE, size[1] * _OVERSAMPLE))
        self.rng = rng
        self.colours = [colour(rng) for _ in range(4)]
        self._matrix, self._centre = matrix * _OVERSAMPLE, np.array(centre) * _OVERSAMPLE
        self._unit = math.sqrt(abs(np.linalg.det(self._matrix)))
        self._draw = ImageDraw.Draw(self.layer)

    def _map(self, points: Sequence[Point]) -> list[Point]:
        return [(float(x), float(y)) for x, y in np.asarray(points) @ self._matrix.T + self._centre]

    def shape(self, points: Sequence[Point], fill: Colour) -> None:
        """A filled polygon."""
        self._draw.polygon(self._map(points), fill=fill)

    def line(self, points: Sequence[Point], width: float, fill: Colour) -> None:
        """A line with round ends; ``width`` in object units."""
        mapped, pixels = self._map(points), max(2, round(width * self._unit))
        self._draw.line(mapped, fill=fill, width=pixels, joint="curve")
        r = pixels / 2
        for x, y in (mapped[0], mapped[-1]):
            self._draw.ellipse((x - r, y - r, x + r, y + r), fill=fill)

    def disc(self, x: float, y: float, rx: float, fill: Colour, ry: float | None = None, turn: float = 0) -> None:
        """A filled ellipse, turned by ``turn`` radians."""
        self.shape(arc(x, y, rx, rx if ry is None else ry, turn=turn), fill)

    def box(self, x: float, y: float, rx: float, ry: float, fill: Colour) -> None:
        """A filled rectangle of centre x, y and half sides rx, ry."""
        self.shape([(x - rx, y - ry), (x + rx, y - ry), (x + rx, y + ry), (x - rx, y + ry)], fill)

    def ring(self, x: float, y: float, r: float, width: float, fill: Colour) -> None:
        """A circle's outline."""
        self.line(arc(x, y, r, r), width, fill)

    def some(self, low: float, high: float) -> float:
        """A random number."""
        return float(self.rng.uniform(low, high))

    def often(self, chance: float = 0.5) -> bool:
        """True in a share ``chance`` of the calls."""
        return bool(self.rng.random() < chance)


def arc(x: float, y: float, rx: float, ry: float, start: float = 0, end: float = 360, turn: float = 0) -> list[Point]:
    """Points along an ellipse between two angles in degrees (clockwise on the picture, 0 to the right)."""
    angles = [math.radians(start + (end - start) * i / 40) for i in range(41)]
    c, s = math.cos(turn), math.sin(turn)
    around = [(rx * math.cos(a), ry * math.sin(a)) for a in angles]
    return [(x + c * u - s * v, y + s * u + c * v) for u, v in around]


def colour(rng: np.random.Generator) -> Colour:
    """A random colour, seldom very dark."""
    r, g, b = colorsys.hsv_to_rgb(rng.random(), rng.uniform(0.15, 0.95), rng.uniform(0.35, 1.0))
    return int(r * 255), int(g * 255), int(b * 255)


def _bicycle(p: Pen) -> None:
    frame, tyre, w = p.colours[0], _DARK if p.often(0.7) else p.colours[1], p.some(0.05, 0.09)
    r, hub, seat, head = p.some(0.36, 0.44), 0.36, (-0.24, -0.3), (0.38, -0.34)
    for x in (-0.56, 0.56):
        for k in range(8):
            a = math.pi * k / 8
            tip = (r * math.cos(a), r * math.sin(a))
            p.line([(x - tip[0], hub - tip[1]), (x + tip[0], hub + tip[1])], 0.012, (150, 150, 150))
        p.ring(x, hub, r, p.some(0.06, 0.1), tyre)
    crank = (-0.02, hub)
    for line in ([(-0.56, hub), crank, head, seat, crank], [(-0.56, hub), seat], [(0.56, hub), head, (0.34, -0.5)]):
        p.line(line, w, frame)
    p.line([seat, (-0.28, -0.44)], w, frame)
    p.shape([(-0.46, -0.5), (-0.1, -0.5), (-0.14, -0.42), (-0.42, -0.4)], _DARK)
    p.line([(0.34, -0.5), (0.5, -0.56), (0.58, -0.46)] if p.often() else [(0.2, -0.54), (0.5, -0.52)], w, _DARK)
    p.ring(*crank, 0.1, 0.04, _DARK)


def _butterfly(p: Pen) -> None:
    upper, lower, spot, _ = p.colours
    tilt, big, small = p.some(0.5, 0.9), p.some(0.42, 0.55), p.some(0.3, 0.42)
    for side in (-1, 1):
        p.disc(side * 0.36, 0.36, small, _DARK, small * 0.72, side * 0.9)
        p.disc(side * 0.36, 0.36, small * 0.85, lower, small * 0.57, side * 0.9)
        p.disc(side * 0.45, -0.3, big, _DARK, big * 0.62, -side * tilt)
        p.disc(side * 0.45, -0.3, big * 0.87, upper, big * 0.5, -side * tilt)
        for x, y, r in ((0.62, -0.46, 0.1), (0.4, -0.2, 0.08), (0.4, 0.42, 0.09)):
            p.disc(side * x, y, r * p.some(0.7, 1.3), spot)
        p.line([(0, -0.4), (side * 0.12, -0.7), (side * 0.26, -0.84)], 0.025, _DARK)
    p.disc(0, 0, 0.07, _DARK, 0.5)
    p.disc(0, -0.46, 0.09, _DARK)


def _car(p: Pen) -> None:
    body, glass = p.colours[0], (185, 210, 225)
    roof, nose, back = p.some(-0.52, -0.34), p.some(0.5, 0.62), p.some(-0.95, -0.6)
    p.shape([(back, -0.05), (back + 0.2, roof), (0.15, roof), (nose, -0.05)], body)
    p.shape([(back + 0.1, -0.06), (back + 0.24, roof + 0.08), (-0.2, roof + 0.08), (-0.2, -0.06)], glass)
    p.shape([(-0.12, -0.06), (-0.12, roof + 0.08), (0.12, roof + 0.08), (nose - 0.12, -0.06)], glass)
    p.shape([(-0.97, -0.08), (0.6, -0.08), (0.95, 0.06), (0.97, 0.32), (-0.97, 0.32)], body)
    p.line([(-0.95, 0.14), (0.93, 0.14)], 0.03, p.colours[1])
    p.line([(-0.16, -0.02), (-0.16, 0.28)], 0.02, _DARK)
    p.disc(0.88, 0.12, 0.07, (250, 240, 170))
    p.box(-0.925, 0.06, 0.045, 0.06, (200, 30, 30))
    r = p.some(0.19, 0.25)
    for x in (-0.55, 0.55):
        p.disc(x, 0.34, r, _DARK)
        p.disc(x, 0.34, r * 0.55, (190, 190, 195))
        p.disc(x, 0.34, r * 0.2, _DARK)


def _clock(p: Pen) -> None:
    rim, face = p.colours[0], (245, 243, 232) if p.often(0.7) else p.colours[1]
    ink = _DARK if sum(face) > 300 else (245, 245, 245)
    if p.often(0.4):  # an alarm clock
        for side in (-1, 1):
            p.line([(side * 0.4, 0.6), (side * 0.6, 0.9)], 0.1, rim)
            p.disc(side * 0.45, -0.72, 0.24, p.colours[2], 0.16, side * 0.6)
    if p.often(0.75):
        p.disc(0, 0, 0.82, rim)
    else:
        p.box(0, 0, 0.82, 0.82, rim)
    p.disc(0, 0, 0.68, face)
    for k in range(12):
        a, inner = math.pi * k / 6, 0.5 if k % 3 == 0 else 0.56
        p.line([(inner * math.cos(a), inner * math.sin(a)), (0.62 * math.cos(a), 0.62 * math.sin(a))], 0.045, ink)
    for length, width in ((0.32, 0.075), (0.5, 0.05)):
        a = p.some(0, 2 * math.pi)
        p.line([(0, 0), (length * math.cos(a), length * math.sin(a))], width, ink)
    p.disc(0, 0, 0.06, ink)


def _cup(p: Pen) -> None:
    body, band, plate, _ = p.colours
    top, bottom, rim = p.some(0.5, 0.62), p.some(0.32, 0.55), p.some(0.1, 0.17)
    if p.often(0.45):
        p.disc(-0.1, 0.66, 0.86, plate, 0.17)
        p.disc(-0.1, 0.64, 0.6, body, 0.1)
    p.line(arc(top - 0.14, -0.05, 0.36, 0.34, -95, 95), p.some(0.09, 0.13), body)
    p.shape([(-top - 0.1, -0.5), (top - 0.1, -0.5), *arc(-0.1, 0.56, bottom, 0.13, 0, 180)], body)
    if p.often(0.6):
        y = p.some(-0.2, 0.2)
        w = top + (bottom - top) * (y + 0.5)
        p.shape([(-w - 0.1, y), (w - 0.1, y), (w - 0.14, y + 0.14), (-w - 0.06, y + 0.14)], band)
    p.disc(-0.1, -0.5, top, (238, 236, 230), rim)
    p.disc(-0.1, -0.48, top * 0.86, (92, 58, 34) if p.often(0.7) else plate, rim * 0.72)
    if p.often(0.4):
        for x in (-0.3, -0.05, 0.2):
            p.line([(x, -0.62), (x + 0.06, -0.74), (x - 0.05, -0.86), (x + 0.03, -0.98)], 0.03, (235, 235, 235))


def _fish(p: Pen) -> None:
    body, fin, mark, _ = p.colours
    tall = p.some(0.28, 0.5)
    p.shape([(-0.45, 0), (-0.95, -p.some(0.3, 0.5)), (-0.8, 0), (-0.95, p.some(0.3, 0.5))], fin)
    p.shape([(-0.3, -tall * 0.7), (-0.15, -tall - p.some(0.12, 0.3)), (0.35, -tall * 0.75)], fin)
    p.shape([(-0.15, tall * 0.8), (-0.2, tall + 0.2), (0.2, tall * 0.85)], fin)
    p.disc(0.12, 0, 0.72, body, tall)
    pattern = int(p.rng.integers(3))
    for k in range(4):
        x = -0.35 + 0.2 * k
        h = tall * 0.85 * math.sqrt(1 - ((x - 0.12) / 0.72) ** 2)
        if pattern == 0:
            p.line([(x, -h), (x + 0.06, 0), (x, h)], 0.07, mark)
        elif pattern == 1:
            p.line(arc(x, 0, 0.14, h * 0.8, -80, 80), 0.02, _DARK)
    p.shape([(0.12, 0.03), (-0.2, 0.2), (-0.12, 0.0)], fin)
    p.line(arc(0.32, 0, 0.12, tall * 0.75, -75, 75), 0.025, _DARK)
    p.disc(0.58, -tall * 0.25, 0.09, (250, 250, 250))
    p.disc(0.6, -tall * 0.25, 0.05, _DARK)
    p.line([(0.82, 0.05), (0.7, tall * 0.22)], 0.025, _DARK)


def _house(p: Pen) -> None:
    wall, roof, door, frame = p.colours
    w, top, peak = p.some(0.55, 0.8), p.some(-0.2, 0.05), p.some(-0.95, -0.7)
    if p.often(0.7):
        x = p.some(0.2, 0.4) * (1 if p.often() else -1)
        p.box(x, (peak + top) / 2, 0.09, (top - peak) / 2, door)
    p.box(0, (top + 0.85) / 2, w, (0.85 - top) / 2, wall)
    over = w + p.some(0.08, 0.2)
    gable = [(0.0, peak)] if p.often(0.7) else [(-w * 0.5, peak + 0.1), (w * 0.5, peak + 0.1)]
    p.shape([(-over, top + 0.03), *gable, (over, top + 0.03)], roof)
    x = p.some(-0.2, 0.2)
    p.box(x, 0.605, 0.13, 0.245, door)
    p.disc(x + 0.08, 0.62, 0.025, (240, 220, 120))
    for side in (-1, 1):
        a, b, s = side * w * 0.66 + x * 0.3, top + 0.26, p.some(0.11, 0.15)
        p.box(a, b, s, s, frame)
        p.box(a, b, s * 0.8, s * 0.8, (175, 210, 235))
        p.line([(a, b - s), (a, b + s)], 0.025, frame)
        p.line([(a - s, b), (a + s, b)], 0.025, frame)


def _key(p: Pen) -> None:
    metal, w = p.colours[0], p.some(0.1, 0.15)
    bow = int(p.rng.integers(3))
    if bow == 0:
        p.ring(-0.6, 0, 0.28, p.some(0.1, 0.15), metal)
    elif bow == 1:
        for a in (90, 210, 330):
            p.ring(-0.6 + 0.2 * math.cos(math.radians(a)), 0.2 * math.sin(math.radians(a)), 0.14, 0.09, metal)
    else:
        p.disc(-0.6, 0, 0.36, metal, 0.3)
    p.line([(-0.34, 0), (0.92, 0)], w, metal)
    if bow == 2:
        p.disc(-0.76, 0, 0.08, _DARK)
        p.line([(-0.2, 0), (0.85, 0)], 0.02, _DARK)
    else:
        p.line([(-0.2, -w), (-0.2, w)], 0.07, metal)
    for k in range(int(p.rng.integers(2, 5))):
        x, length = 0.86 - 0.13 * k, p.some(0.14, 0.32)
        p.box(x, length / 2, 0.05, length / 2, metal)


def _mushroom(p: Pen) -> None:
    cap, spot, stem = p.colours[0], p.colours[1], (236, 226, 205) if p.often(0.6) else p.colours[2]
    w, h, foot = p.some(0.62, 0.9), p.some(0.5, 0.85), p.some(0.16, 0.3)
    p.shape([(-0.15, 0), (0.15, 0), (foot, 0.82), *arc(0, 0.82, foot, 0.1, 0, 180), (-foot, 0.82)], stem)
    p.shape(arc(0, 0, w, 0.14, 0, 180), (215, 195, 170))
    for k in range(-5, 6):
        p.line([(k * 0.03, 0.0), (k * w / 6.2, 0.1)], 0.012, (150, 130, 110))
    p.shape(arc(0, 0.02, w, h, 180, 360), cap)
    if p.often(0.4):
        p.shape([(-0.24, 0.3), (0.24, 0.3), (0.3, 0.4), (-0.3, 0.4)], (225, 215, 195))
    if p.often(0.8):
        for x, y in ((-0.5, 0.3), (0.0, 0.6), (0.5, 0.35), (-0.2, 0.28), (0.26, 0.72), (-0.36, 0.66)):
            p.disc(x * w, -y * h, p.some(0.05, 0.11), spot, 0.06)


def _sailboat(p: Pen) -> None:
    hull, main, jib, flag = p.colours
    white = (244, 242, 235)
    mast, low = p.some(-0.12, 0.12), p.some(0.28, 0.4)
    p.line([(mast, 0.5), (mast, -0.92)], 0.05, (110, 80, 55))
    p.shape([(mast + 0.04, -0.85), (mast + p.some(0.5, 0.75), low), (mast + 0.04, low)], main if p.often() else white)
    if p.often(0.8):
        front = mast - 0.04
        p.shape(
            [(front, p.some(-0.8, -0.5)), (front, low), (front - p.some(0.3, 0.5), low)], jib if p.often() else white
        )
    p.shape([(mast, -0.95), (mast - 0.25, -0.87), (mast, -0.79)], flag)
    bow = p.some(0.8, 0.95)
    p.shape([(-0.85, 0.45), (bow, 0.42), (0.6, 0.8), (-0.62, 0.8)], hull)
    p.line([(-0.8, 0.52), (bow - 0.06, 0.49)], 0.04, flag)
    if p.often():
        p.line([(-1 + 0.25 * k, 0.84 + 0.05 * (k % 2)) for k in range(9)], 0.05, (120, 160, 200))


def _tree(p: Pen) -> None:
    leaf, fruit, trunk = p.colours[0], p.colours[1], (112, 78, 50) if p.often(0.7) else p.colours[2]
    w = p.some(0.07, 0.14)
    p.shape([(-w, 0.1), (w, 0.1), (w * 1.5, 0.95), (-w * 1.5, 0.95)], trunk)
    if p.often(0.4):  # a conifer
        for k, y in enumerate((0.45, 0.05, -0.35)):
            half = 0.7 - 0.15 * k + p.some(-0.06, 0.06)
            p.shape([(-half, y), (0, y - 0.62), (half, y)], leaf)
        return
    for side in (-1, 1):
        p.line([(0, 0.35), (side * 0.35, -0.1)], w * 0.8, trunk)
    dark: Colour = (leaf[0] * 3 // 4, leaf[1] * 3 // 4, leaf[2] * 3 // 4)
    for k in range(11):
        a = 2 * math.pi * k / 8
        far = 0.42 if k < 8 else 0.12
        p.disc(far * math.cos(a), -0.3 + 0.8 * far * math.sin(a), p.some(0.24, 0.34), dark if k % 2 else leaf)
    if p.often():
        for _ in range(8):
            p.disc(p.some(-0.5, 0.5), p.some(-0.65, 0.05), 0.05, fruit)


def _umbrella(p: Pen) -> None:
    first, second, handle, _ = p.colours
    h, n = p.some(0.65, 0.85), int(p.rng.integers(4, 7))
    p.line([(0, -0.98), (0, 0.72), *arc(0.14, 0.74, 0.14, 0.16, 180, 20)], p.some(0.05, 0.08), handle)
    edges = [-0.92 + 1.84 * k / n for k in range(n + 1)]
    ribs = [arc(0, 0, x, h, 270, 360) for x in edges]  # from the tip down to each corner
    striped = p.often(0.6)
    for k in range(n):
        left, right = edges[k], edges[k + 1]
        hem = arc((left + right) / 2, 0, (right - left) / 2, 0.1, 180, 0)
        p.shape([*ribs[k], *hem, *ribs[k + 1][::-1]], second if striped and k % 2 else first)
    for rib in ribs:
        p.line(rib, 0.02, _DARK)
    p.disc(0, -0.02 - h, 0.04, handle)


_ALL = (_bicycle, _butterfly, _car, _clock, _cup, _fish, _house, _key, _mushroom, _sailboat, _tree, _umbrella)
DRAWINGS: dict[str, Callable[[Pen], None]] = {function.__name__[1:]: function for function in _ALL}
