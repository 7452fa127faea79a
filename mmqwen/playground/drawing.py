"""What a person draws, as an image like those of the demo's data, and as rows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from mmqwen.demo.digits import SIDE, encode_image

FINE = 32
"""Side of the bitmap whose 4 x 4 blocks are counted: so the data's images were made."""
WIDTH = 20
"""Widest digit, in pixels of the bitmap. Each image of the data is as high as the bitmap, and of
16, 18, 20, 22 and 24 this brings drawings closest to real digits."""
INK = 310
"""Black pixels of a digit. The data's images have 303 to 330 on average, whatever the digit, so the
pen is chosen by them: thick for a 1, thin for an 8."""
PEN = (1.0, 4.5)
"""Thinnest and thickest pen: radii, in pixels of the bitmap."""

MAX_STROKES = 64
MAX_POINTS = 4096

Point = tuple[float, float]


class DrawingError(ValueError):
    """What came is no drawing."""


def read_strokes(value: Any) -> list[np.ndarray]:
    """Strokes as they came from a page, checked.

    Args:
        value: `[[[x, y], ...], ...]`, y downwards, in any unit.

    Returns:
        float64 `[n, 2]` each, n at least 1; at least one of them.

    Raises:
        DrawingError: anything else, more than `MAX_STROKES` strokes or `MAX_POINTS` points.
    """
    if not isinstance(value, list) or not 1 <= len(value) <= MAX_STROKES:
        raise DrawingError(f"strokes are no list of 1 to {MAX_STROKES}; draw fewer lines")
    points = 0
    for at, stroke in enumerate(value):
        if not isinstance(stroke, list) or not stroke:
            raise DrawingError(f"stroke {at} is no list of points, expected [[x, y], ...]")
        points += len(stroke)
        if points > MAX_POINTS:
            raise DrawingError(f"more than {MAX_POINTS} points; draw a shorter line")
        if not all(map(_is_point, stroke)):
            raise DrawingError(
                f"stroke {at} holds what is no point, expected [x, y] within 1e6 of 0"
            )
    return [np.array(stroke, np.float64) for stroke in value]


def _is_point(value: Any) -> bool:
    return (
        isinstance(value, list)
        and len(value) == 2
        and all(type(number) in (int, float) and -1e6 <= number <= 1e6 for number in value)
    )


def draw(strokes: Sequence[np.ndarray]) -> np.ndarray:
    """The image that the data would hold of a drawing, wherever and however large it was drawn.

    Args:
        strokes: `[n, 2]` points (x, y) each, y downwards; at least one point in all.

    Returns:
        float32 `[8, 8]`, 0 (paper) to 1 (ink) in 17 levels; some pixel is not 0.
    """
    thin, thick = PEN
    for _ in range(8):  # towards the pen by which the ink is right
        pen = (thin + thick) / 2
        bitmap = _rasterise(strokes, pen)
        thin, thick = (pen, thick) if bitmap.sum() < INK else (thin, pen)
    step = FINE // SIDE
    counts = bitmap.reshape(SIDE, step, SIDE, step).sum(axis=(1, 3))
    return (counts / step**2).astype(np.float32)


def _rasterise(strokes: Sequence[np.ndarray], pen: float) -> np.ndarray:
    """A bool `[32, 32]` of the pixels that a pen covers where it draws in full height."""
    points = np.concatenate(strokes)
    low, high = points.min(axis=0), points.max(axis=0)
    width, height = np.maximum(high - low, 1e-9)
    fit_x, fit_y = (WIDTH - 2 * pen) / width, (FINE - 2 * pen) / height
    scale_y = min(fit_y, 2 * fit_x)  # what lies down is not stretched until it stands
    scale = np.array([min(fit_x, scale_y), scale_y])
    pixels = np.stack(np.meshgrid(np.arange(FINE), np.arange(FINE)), axis=-1) + 0.5
    bitmap = np.zeros((FINE, FINE), bool)
    for stroke in strokes:
        path = (stroke - (low + high) / 2) * scale + FINE / 2
        for start, end in zip(path, [*path[1:], path[-1]], strict=True):
            along = end - start
            share = (pixels - start) @ along / max(float(along @ along), 1e-9)
            nearest = start + np.clip(share, 0, 1)[..., None] * along
            bitmap |= ((pixels - nearest) ** 2).sum(axis=-1) <= pen**2
    return bitmap


def rows_of(strokes: Sequence[np.ndarray], shuffle: int | None = None) -> dict[str, torch.Tensor]:
    """The rows of a drawing, by the demo's own encoder.

    Args:
        strokes: as `draw` takes them.
        shuffle: a seed, to have the same numbers in other places. Not whole rows: each says which
            column it is, so their order says little (of held-out digits 94% are read with rows in
            another order, 10% with numbers in other places).

    Returns:
        `strokes` float32 `[n, 16]` and `profile` float32 `[2, 10]`.
    """
    rows = encode_image(draw(strokes))
    if shuffle is None:
        return rows
    generator = torch.Generator().manual_seed(shuffle)
    return {
        name: item.flatten()[torch.randperm(item.numel(), generator=generator)].view(item.shape)
        for name, item in rows.items()
    }


def _arc(x: float, y: float, rx: float, ry: float, start: float, end: float) -> list[Point]:
    """Part of an ellipse; degrees, clockwise from the right."""
    angles = np.radians(np.linspace(start, end, 13)).tolist()
    return [(x + rx * math.cos(angle), y + ry * math.sin(angle)) for angle in angles]


SAMPLES: dict[str, list[list[Point]]] = {
    "0": [_arc(0.5, 0.5, 0.22, 0.35, -90, 270)],
    "1": [[(0.38, 0.3), (0.54, 0.15), (0.54, 0.85)]],
    "2": [[*_arc(0.5, 0.35, 0.2, 0.2, -170, 30), (0.3, 0.85), (0.74, 0.85)]],
    "3": [[*_arc(0.48, 0.32, 0.2, 0.17, -160, 80), *_arc(0.48, 0.67, 0.23, 0.18, -80, 160)]],
    "4": [[(0.52, 0.15), (0.28, 0.58), (0.76, 0.58)], [(0.62, 0.4), (0.58, 0.85)]],
    "5": [[(0.7, 0.15), (0.36, 0.15), (0.33, 0.47), *_arc(0.48, 0.63, 0.22, 0.21, -120, 150)]],
    "6": [[(0.55, 0.14), (0.4, 0.35), (0.34, 0.62), *_arc(0.5, 0.69, 0.16, 0.16, 180, -180)]],
    "7": [[(0.28, 0.16), (0.72, 0.16), (0.45, 0.85)], [(0.38, 0.5), (0.66, 0.5)]],
    "8": [[*_arc(0.51, 0.32, 0.13, 0.17, 90, 450), *_arc(0.49, 0.67, 0.14, 0.18, -90, 270)]],
    "9": [[*_arc(0.5, 0.34, 0.19, 0.19, 0, -360), (0.68, 0.45), (0.58, 0.86)]],
}
"""One drawing of each digit, for who has no pointer at hand: points in a square of side 1."""
