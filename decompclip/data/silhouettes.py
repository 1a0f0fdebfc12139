"""The twelve silhouettes of the Shapes world, as signed-distance tables.

A table samples the signed distance to a silhouette's outline on a regular grid over
[-1.5, 1.5]^2 (negative inside, y pointing down, the silhouette filling roughly [-1, 1]^2). Rendering
an object is then one bilinear look-up, which anti-aliases the edge at any size.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

EXTENT = 1.5
"""Half-width of the square that a table covers, in units of the object's radius."""

TABLE_SIZE = 97

_POLYGONS: dict[str, list[tuple[float, float]]] = {
    "square": [(-0.85, -0.85), (0.85, -0.85), (0.85, 0.85), (-0.85, 0.85)],
    "triangle": [(0.0, -1.0), (1.0, 0.8), (-1.0, 0.8)],
    "cross": [
        (-0.3, -1.0), (0.3, -1.0), (0.3, -0.3), (1.0, -0.3), (1.0, 0.3), (0.3, 0.3),
        (0.3, 1.0), (-0.3, 1.0), (-0.3, 0.3), (-1.0, 0.3), (-1.0, -0.3), (-0.3, -0.3),
    ],
    "arrow": [
        (-1.0, -0.35), (0.1, -0.35), (0.1, -0.95), (1.05, 0.0), (0.1, 0.95), (0.1, 0.35), (-1.0, 0.35),
    ],
    "hourglass": [(-0.9, -1.0), (0.9, -1.0), (0.15, 0.0), (0.9, 1.0), (-0.9, 1.0), (-0.15, 0.0)],
    "bolt": [(0.5, -1.0), (-0.75, 0.15), (-0.1, 0.15), (-0.5, 1.0), (0.75, -0.2), (0.1, -0.2)],
}  # fmt: skip


def _star() -> list[tuple[float, float]]:
    angles = np.arange(10) * np.pi / 5 - np.pi / 2
    radii = np.where(np.arange(10) % 2 == 0, 1.08, 0.45)
    return [(float(r * np.cos(a)), float(r * np.sin(a))) for r, a in zip(radii, angles, strict=True)]


def _polygon(x: np.ndarray, y: np.ndarray, corners: list[tuple[float, float]]) -> np.ndarray:
    """Exact signed distance to a simple polygon (even-odd rule)."""
    nearest = np.full_like(x, np.inf)
    inside = np.zeros_like(x, dtype=bool)
    for (x0, y0), (x1, y1) in zip(corners, corners[1:] + corners[:1], strict=True):
        ex, ey = x1 - x0, y1 - y0
        t = np.clip(((x - x0) * ex + (y - y0) * ey) / (ex * ex + ey * ey), 0.0, 1.0)
        nearest = np.minimum(nearest, np.hypot(x - x0 - t * ex, y - y0 - t * ey))
        if ey != 0.0:
            inside ^= ((y0 > y) != (y1 > y)) & (x < x0 + ex * (y - y0) / ey)
    return np.where(inside, -nearest, nearest)


def _heart(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    t = np.linspace(0.0, 2 * np.pi, 72, endpoint=False)
    px = 16 * np.sin(t) ** 3 / 16.5
    py = -(13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)) / 16.5 - 0.1
    return _polygon(x, y, list(zip(px.tolist(), py.tolist(), strict=True)))


def _mushroom(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    cap = np.maximum(np.hypot(x, y) - 1.0, y)
    stem = np.maximum(np.abs(x) - 0.28, np.maximum(-y - 0.1, y - 0.95))
    return np.minimum(cap, stem)


def _distance(name: str, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    r = np.hypot(x, y)
    match name:
        case "circle":
            return r - 0.92
        case "ring":
            return np.abs(r - 0.75) - 0.25
        case "crescent":
            return np.maximum(r - 1.0, 0.85 - np.hypot(x - 0.5, y))
        case "heart":
            return _heart(x, y)
        case "mushroom":
            return _mushroom(x, y)
        case "star":
            return _polygon(x, y, _star())
        case _:
            return _polygon(x, y, _POLYGONS[name])


@lru_cache(maxsize=1)
def distance_tables(names: tuple[str, ...]) -> Float[Tensor, "shape 1 rows columns"]:
    """Signed-distance tables of the named silhouettes, in units of the object's radius."""
    axis = np.linspace(-EXTENT, EXTENT, TABLE_SIZE)
    y, x = np.meshgrid(axis, axis, indexing="ij")
    return torch.from_numpy(np.stack([_distance(name, x, y) for name in names])).float().unsqueeze(1)
