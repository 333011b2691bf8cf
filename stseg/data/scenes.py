"""Synthetic street scenes drawn on the fly: small, free of any license, and hard to learn from few annotations."""

from __future__ import annotations

import colorsys
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFilter
from torch import Tensor

from stseg.data.named import NamedDataset

GROUND, SKY, ROAD, BUILDING, TREE, CAR, PERSON = range(7)
_OVERSAMPLING = 2  # colors are drawn this much larger, for soft edges
_Color = tuple[int, int, int]
_Point = tuple[float, float]


class SyntheticScenes(NamedDataset[tuple[Tensor, Tensor]]):
    """Synthetic street scenes with seven classes and varying light, season and colors.

    Classes differ in shape and position but hardly in color: facades can be as green as trees, cars as gray as the
    road, and the light varies from noon to dusk and fog. A few annotated scenes show few of the combinations, so
    unlabeled scenes help. A scene is drawn on first access and cached.

    Args:
        n: number of scenes.
        size: side of the square images, or ``(height, width)``, in pixels; at least 16.
        seed: scene ``i`` depends on the seed and on ``i`` alone, not on ``n``.

    Attributes:
        classes: names of the classes, in the order of their mask values.
        ids: ``scene_<seed>_00000`` and so on.

    Shape:
        Items are the image, uint8 ``(3, H, W)``, and the mask, uint8 ``(H, W)``.

    Raises:
        ValueError: if a setting is out of its range.

    Example:
        >>> scenes = SyntheticScenes(10, size=64, seed=0)
        >>> image, mask = scenes[9]
        >>> image.shape, mask.shape, len(scenes.classes)
        (torch.Size([3, 64, 64]), torch.Size([64, 64]), 7)
    """

    classes = ("ground", "sky", "road", "building", "tree", "car", "person")

    def __init__(self, n: int, *, size: int | tuple[int, int] = 64, seed: int = 0) -> None:
        self.size = (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))
        if n < 1:
            raise ValueError(f"n is {n}; expected 1 or more scenes")
        if min(self.size) < 16:
            raise ValueError(f"size is {size}; expected sides of 16 pixels or more")
        if seed < 0:
            raise ValueError(f"seed is {seed}; expected 0 or more")
        self.seed = seed
        self.ids = [f"scene_{seed}_{i:05d}" for i in range(n)]
        self._drawn: dict[int, tuple[Tensor, Tensor]] = {}

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"scene {index} of {len(self)}")
        index %= len(self)
        if index not in self._drawn:
            scene = _Scene(*self.size, np.random.default_rng([self.seed, index]))
            scene.draw_all()
            image = torch.from_numpy(scene.photograph()).permute(2, 0, 1).contiguous()
            self._drawn[index] = image, torch.from_numpy(scene.mask())
        image, mask = self._drawn[index]
        return image.clone(), mask.clone()

    def __repr__(self) -> str:
        return f"SyntheticScenes({len(self)}, size={self.size}, seed={self.seed})"


class _Scene:
    """Colors and classes of one scene, drawn from far to near. Coordinates are in 0..1, y downwards."""

    def __init__(self, height: int, width: int, random: np.random.Generator) -> None:
        self.height, self.width, self.random = height, width, random
        size = (width * _OVERSAMPLING, height * _OVERSAMPLING)
        self.colors, self.labels = Image.new("RGB", size), Image.new("L", size, GROUND)
        self._brushes = ImageDraw.Draw(self.colors), ImageDraw.Draw(self.labels)
        self.horizon = self.uniform(0.3, 0.5)

    def uniform(self, low: float, high: float) -> float:
        return float(self.random.uniform(low, high))

    def color(
        self,
        hue: tuple[float, float] = (0.0, 1.0),
        saturation: tuple[float, float] = (0.1, 0.8),
        value: tuple[float, float] = (0.25, 0.95),
    ) -> _Color:
        r, g, b = colorsys.hsv_to_rgb(self.uniform(*hue) % 1, self.uniform(*saturation), self.uniform(*value))
        return int(r * 255), int(g * 255), int(b * 255)

    def one_of(self, *colors: _Color) -> _Color:
        return colors[int(self.random.integers(len(colors)))]

    def polygon(self, points: list[_Point], color: _Color, label: int) -> None:
        width, height = self.colors.size
        scaled = [(x * width, y * height) for x, y in points]
        self._brushes[0].polygon(scaled, fill=color)
        self._brushes[1].polygon(scaled, fill=label)

    def box(self, left: float, top: float, right: float, bottom: float, color: _Color, label: int) -> None:
        self.polygon([(left, top), (right, top), (right, bottom), (left, bottom)], color, label)

    def ellipse(self, x: float, y: float, rx: float, ry: float, color: _Color, label: int) -> None:
        angles = np.linspace(0, 2 * np.pi, 20, endpoint=False)
        self.polygon([(x + rx * np.cos(a), y + ry * np.sin(a)) for a in angles], color, label)

    def draw_all(self) -> None:
        self.draw_sky_and_ground()
        self.draw_buildings()
        self.draw_road()
        # Depths from the horizon (0) to the viewer (1): near objects occlude far ones.
        for depth in sorted(self.random.uniform(0.05, 0.75, int(self.random.integers(3, 8)))):
            draw = (self.draw_tree, self.draw_car, self.draw_person)[int(self.random.choice(3, p=[0.28, 0.3, 0.42]))]
            draw(float(depth))

    def draw_sky_and_ground(self) -> None:
        sky = self.one_of(
            self.color((0.52, 0.65), (0.2, 0.7), (0.6, 1.0)),  # clear
            self.color((0.5, 0.7), (0.0, 0.1), (0.5, 0.9)),  # cloudy
            self.color((0.95, 1.12), (0.3, 0.6), (0.6, 0.95)),  # evening
            self.color((0.6, 0.75), (0.3, 0.6), (0.15, 0.35)),  # night
        )
        ground = self.one_of(
            self.color((0.2, 0.38), (0.3, 0.7), (0.3, 0.7)),  # grass
            self.color((0.05, 0.13), (0.2, 0.6), (0.4, 0.8)),  # sand
            self.color((0.5, 0.7), (0.0, 0.1), (0.75, 1.0)),  # snow
            self.color((0.0, 1.0), (0.0, 0.15), (0.3, 0.6)),  # paving
        )
        self.box(0, 0, 1, self.horizon, sky, SKY)
        self.box(0, self.horizon, 1, 1, ground, GROUND)
        for _ in range(int(self.random.integers(0, 4))):
            cloud = self.color((0, 1), (0, 0.1), (0.6, 1.0))
            self.ellipse(self.uniform(0, 1), self.uniform(0, self.horizon), self.uniform(0.05, 0.2), 0.03, cloud, SKY)

    def draw_buildings(self) -> None:
        x = self.uniform(-0.2, 0.1)
        while x < 1:
            width = self.uniform(0.1, 0.3)
            if self.random.random() < 0.65:
                top = self.horizon - self.uniform(0.08, 0.35)
                bottom = self.horizon + self.uniform(0.0, 0.06)
                facade = self.color(saturation=(0.0, 0.7))
                self.box(x, top, x + width, bottom, facade, BUILDING)
                if self.random.random() < 0.4:
                    roof = [(x, top), (x + width / 2, top - self.uniform(0.03, 0.1)), (x + width, top)]
                    self.polygon(roof, self.color(), BUILDING)
                self.draw_windows(x, top, x + width, bottom)
            x += width + self.uniform(0.0, 0.1)

    def draw_windows(self, left: float, top: float, right: float, bottom: float) -> None:
        columns, rows = int(self.random.integers(2, 5)), int(self.random.integers(2, 5))
        glass = self.color((0.0, 1.0), (0.0, 0.4), (0.1, 1.0))
        w, h = (right - left) / columns, (bottom - top) / rows
        for i in range(columns):
            for j in range(rows):
                x, y = left + (i + 0.25) * w, top + (j + 0.25) * h
                self.box(x, y, x + w / 2, y + h / 2, glass, BUILDING)

    def draw_road(self) -> None:
        asphalt = self.one_of(
            self.color((0, 1), (0.0, 0.12), (0.2, 0.65)),
            self.color((0.03, 0.12), (0.1, 0.5), (0.3, 0.7)),
        )
        far, near = self.uniform(0.3, 0.7), self.uniform(0.2, 0.8)
        half_far, half_near = self.uniform(0.02, 0.06), self.uniform(0.25, 0.6)
        y = self.horizon + 0.02
        edges = [(far - half_far, y), (far + half_far, y), (near + half_near, 1.0), (near - half_near, 1.0)]
        self.polygon(edges, asphalt, ROAD)
        paint = self.color((0.1, 0.17), (0.0, 0.5), (0.7, 1.0))
        for start in np.arange(0.1, 1.0, 0.25):
            ends = [(float(t), far + (near - far) * float(t), 0.004 + 0.012 * float(t)) for t in (start, start + 0.1)]
            left = [(x - half, y + (1 - y) * t) for t, x, half in ends]
            right = [(x + half, y + (1 - y) * t) for t, x, half in reversed(ends)]
            self.polygon(left + right, paint, ROAD)

    def foot(self, depth: float) -> tuple[float, float, float]:
        """Return the position of an object at a depth, and the scale there."""
        return self.uniform(0.0, 1.0), self.horizon + (1 - self.horizon) * depth, 0.45 + 0.55 * depth

    def draw_tree(self, depth: float) -> None:
        x, y, scale = self.foot(depth)
        height, crown = scale * self.uniform(0.3, 0.55), scale * self.uniform(0.12, 0.22)
        self.box(
            x - 0.02 * scale,
            y - height,
            x + 0.02 * scale,
            y,
            self.color((0.03, 0.1), (0.2, 0.6), (0.15, 0.5)),
            TREE,
        )
        leaves = self.one_of(
            self.color((0.2, 0.42), (0.3, 0.9), (0.15, 0.7)),
            self.color((0.0, 0.14), (0.5, 0.9), (0.4, 0.9)),  # autumn
            self.color((0.0, 1.0), (0.0, 0.15), (0.6, 0.95)),  # snow
        )
        for _ in range(int(self.random.integers(2, 6))):
            dx, dy = self.uniform(-0.6, 0.6) * crown, self.uniform(-0.6, 0.6) * crown
            shade = self.uniform(0.75, 1.1)
            tint = tuple(min(255, int(c * shade)) for c in leaves)
            self.ellipse(x + dx, y - height + dy, crown * 0.7, crown * 0.7, (tint[0], tint[1], tint[2]), TREE)

    def draw_car(self, depth: float) -> None:
        x, y, scale = self.foot(depth)
        length, height = scale * self.uniform(0.28, 0.45), scale * self.uniform(0.1, 0.16)
        paint = self.color(saturation=(0.0, 1.0), value=(0.1, 1.0))
        left, right, waist = x - length / 2, x + length / 2, y - height
        self.box(left, waist, right, y, paint, CAR)
        cabin = [
            (left + 0.2 * length, waist),
            (left + 0.32 * length, waist - 0.8 * height),
            (right - 0.3 * length, waist - 0.8 * height),
            (right - 0.12 * length, waist),
        ]
        self.polygon(cabin, self.color((0.5, 0.7), (0.0, 0.3), (0.1, 0.8)), CAR)
        for wheel in (left + 0.22 * length, right - 0.22 * length):
            radius = 0.4 * height
            self.ellipse(wheel, y, radius * self.height / self.width, radius, self.color(value=(0.0, 0.25)), CAR)

    def draw_person(self, depth: float) -> None:
        x, y, scale = self.foot(depth)
        height = scale * self.uniform(0.28, 0.45)
        half = 0.18 * height
        self.box(x - half, y - 0.45 * height, x - 0.2 * half, y, self.color(value=(0.05, 0.8)), PERSON)
        self.box(x + 0.2 * half, y - 0.45 * height, x + half, y, self.color(value=(0.05, 0.8)), PERSON)
        self.box(
            x - 1.2 * half,
            y - 0.8 * height,
            x + 1.2 * half,
            y - 0.4 * height,
            self.color((0, 1), (0, 1), (0.05, 1)),
            PERSON,
        )
        skin = self.color((0.02, 0.1), (0.2, 0.6), (0.25, 1.0))
        self.ellipse(x, y - 0.88 * height, 0.12 * height, 0.12 * height, skin, PERSON)

    def photograph(self) -> np.ndarray[Any, np.dtype[np.uint8]]:
        """Return the image, uint8 ``(H, W, 3)``, with light, fog, blur and noise."""
        image = self.colors.resize((self.width, self.height), Image.Resampling.BOX)
        if self.random.random() < 0.4:
            image = image.filter(ImageFilter.GaussianBlur(self.uniform(0.2, 0.9)))
        pixels = np.asarray(image, dtype=np.float64) / 255
        row, column = np.mgrid[0 : 1 : self.height * 1j, 0 : 1 : self.width * 1j]
        if self.random.random() < 0.35:  # fog, thickest at the horizon
            thickness = self.uniform(0.2, 0.6) * np.exp(-np.abs(row - self.horizon) * self.uniform(1, 4))
            pixels += thickness[..., None] * (self.uniform(0.6, 0.95) - pixels)
        slope = self.random.uniform(-0.35, 0.35, 2)
        light = 1 + slope[0] * (row - 0.5) + slope[1] * (column - 0.5)
        pixels *= light[..., None] * self.random.uniform(0.8, 1.2, 3) * self.uniform(0.5, 1.2)
        pixels += self.random.normal(0, 1, pixels.shape) * self.uniform(0.005, 0.04)
        return np.asarray((pixels.clip(0, 1) * 255).round(), dtype=np.uint8)

    def mask(self) -> np.ndarray[Any, np.dtype[np.uint8]]:
        """Return the classes, uint8 ``(H, W)``."""
        return np.array(self.labels.resize((self.width, self.height), Image.Resampling.NEAREST))
