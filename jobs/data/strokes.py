"""Drawings of made-up classes: each class is a few curved strokes, and each drawing a distorted copy of them."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
from PIL import Image, ImageDraw

Generator = np.random.Generator
Strokes = list[np.ndarray]  # each float64 (points, 2): x and y, mostly in [-1, 1]

POINTS = 24  # of a stroke
SMOOTH = 3  # drawn this many times larger, then reduced, so that lines have smooth edges


def drawings(seed: tuple[int, ...], count: int, size: int) -> Iterator[Image.Image]:
    """Yield `count` drawings of one class, each size x size pixels, black on white. seed: decides the class and its
    drawings."""
    strokes = _class_strokes(np.random.default_rng([*seed, 0]))
    for number in range(1, count + 1):
        yield _render(_distorted(strokes, np.random.default_rng([*seed, number])), size)


def _class_strokes(random: Generator) -> Strokes:
    """Invent a class: 3 to 6 strokes, each a line, an arc or a wave."""
    return [_stroke(random) for _ in range(random.integers(3, 7))]


def _stroke(random: Generator) -> np.ndarray:
    along = np.linspace(0.0, 1.0, POINTS)
    kind = random.integers(3)
    if kind == 0:  # a line
        start, end = random.uniform(-0.9, 0.9, (2, 2))
        return np.asarray(start + along[:, None] * (end - start))
    if kind == 1:  # an arc, up to a whole ellipse
        angles = random.uniform(0, 2 * math.pi) + along * random.uniform(0.4, 1.0) * 2 * math.pi
        points = np.stack([np.cos(angles), np.sin(angles)], axis=1) * random.uniform(0.15, 0.6, 2)
        return np.asarray(points + random.uniform(-0.4, 0.4, 2))
    start, end = random.uniform(-0.9, 0.9, (2, 2))
    across = np.array([start[1] - end[1], end[0] - start[0]])
    wave = np.sin(along * 2 * math.pi * random.uniform(0.5, 2.5)) * random.uniform(0.1, 0.4)
    return np.asarray(start + along[:, None] * (end - start) + wave[:, None] * across)


def _distorted(strokes: Strokes, random: Generator) -> Strokes:
    """Imitate another hand: rotate, shear, scale and move the whole drawing; bend and move each stroke a little."""
    angle, shear = random.normal(0, 0.15), random.normal(0, 0.1)
    scale = random.uniform(0.65, 1.0) * random.uniform(0.85, 1.15, 2)
    turn = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle) + shear, math.cos(angle)]])
    moved = random.normal(0, 0.08, 2)
    result = []
    for stroke in strokes:
        ends = random.normal(0, 0.06, (2, 2))
        bend = np.sin(np.linspace(0, math.pi, len(stroke)))[:, None] * random.normal(0, 0.06, 2)
        along = np.linspace(0.0, 1.0, len(stroke))[:, None]
        bent = stroke + ends[0] + along * (ends[1] - ends[0]) + bend
        result.append((bent * scale) @ turn.T + moved)
    return result


def _render(strokes: Strokes, size: int) -> Image.Image:
    side = size * SMOOTH
    image = Image.new("L", (side, side), 255)
    pen = ImageDraw.Draw(image)
    for stroke in strokes:
        points = [(float(x), float(y)) for x, y in (stroke * 0.45 + 0.5) * side]
        pen.line(points, fill=0, width=max(1, round(side * 0.012)), joint="curve")
    return image.resize((size, size), Image.Resampling.BOX).convert("RGB")
