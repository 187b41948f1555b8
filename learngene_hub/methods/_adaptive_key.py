"""The key of a data set: the mean of random features of what the anchor sees in its images, and no image.

    phi(x)  the anchor's last pooled feature of image x, scaled to length 1 (D numbers)
    psi(z)  sqrt(2 / R) cos(Omega z + b), Omega ~ N(0, 1 / scale^2), b ~ U[0, 2 pi): R random Fourier features of a
            Gaussian kernel (Rahimi and Recht, NIPS 2007)
    m       the mean of psi(phi(x)) over the data set

The mean of a mixture is the mixture of the means, so that a task's m tells how much of each data set is in it. Of the
data set itself are also kept: mean and variance of phi, and how far the means of n of its images lie from that of the
others, the median and the 95th percentile of it at each n of COUNTS: a task that lies farther is not of its kind. Both
means are of few images, so that of n and N the distance goes with sqrt(1/n + 1/N), however large n.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from learngene_hub._check import is_number, require_int
from learngene_hub.data import seed_of
from learngene_hub.errors import DataError, SettingsError

COUNTS = (10, 30, 100)  # images of a task at which distances are known
LEVELS = (0.5, 0.95)
DRAWS = 200  # samples of each count
KEPT = 2000  # rows of psi that are kept to draw from
LEAST = 2 * COUNTS[0]  # images, so that ten of them can be told from the others


@dataclass(frozen=True, kw_only=True)
class Space:
    """What all keys of a pool have in common: keys of two spaces cannot be compared."""

    features: int = 1024  # R
    seed: int = 0  # of Omega and b
    scale: float = 0.0  # of the kernel: the median distance of two images of the first data set; 0: not known yet
    image_size: int = 64  # pixels

    def __post_init__(self) -> None:
        for name, least in (("features", 1), ("seed", 0), ("image_size", 1)):
            require_int(f"key {name}", getattr(self, name), at_least=least, error=SettingsError)
        if self.features > 2**16:
            raise SettingsError(f"key features {self.features} asked; {2**16} is the most that works")
        if self.image_size > 2**13:
            raise SettingsError(f"image_size {self.image_size} asked of a pool; {2**13} is the most that works")
        if not is_number(self.scale) or not 0 <= self.scale <= 2:  # of points on a sphere of radius 1
            raise SettingsError(f"key scale {self.scale!r} asked; it is a distance from 0 to 2")

    def psi(self, phi_BD: Tensor) -> Tensor:
        """(B, R) random features, float32."""
        generator = torch.Generator().manual_seed(seed_of("key", self.seed))
        omega_DR = torch.randn(phi_BD.shape[1], self.features, generator=generator) / self.scale
        shift_R = torch.rand(self.features, generator=generator) * (2 * math.pi)
        return (phi_BD @ omega_DR + shift_R).cos() * math.sqrt(2 / self.features)


def scale_of(phi_BD: Tensor, seed: int) -> float:
    """The median distance of two of at most 500 of these features, to six digits.

    Raises:
        DataError: fewer than two, or all alike.
    """
    order = torch.randperm(len(phi_BD), generator=torch.Generator().manual_seed(seed_of("scale", seed)))[:500]
    apart = torch.pdist(phi_BD[order].double())
    median = float(f"{float(apart.median()):.6g}") if len(apart) else 0.0
    if median <= 0:
        raise DataError(
            f"{len(phi_BD)} images that the anchor cannot tell apart given; a data set of pictures would work"
        )
    return median


@dataclass(frozen=True, eq=False)
class Key:
    """What is known of a data set, or of a task, without its images."""

    mean: Tensor  # (R,) of psi
    centre: Tensor  # (D,) of phi
    variance: Tensor  # (D,) of phi
    residuals: Tensor  # (levels, counts): distances of the means of n images from that of the others
    count: int  # images

    def tensors(self) -> dict[str, Tensor]:
        """By the names that they have in a file."""
        named = {f"key.{name}": getattr(self, name) for name in ("mean", "centre", "variance", "residuals")}
        return named | {"key.count": torch.tensor([float(self.count)])}

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> Key:
        """The inverse of ``tensors``."""
        named = {name: tensors[f"key.{name}"].float() for name in ("mean", "centre", "variance", "residuals")}
        return cls(**named, count=max(1, int(tensors["key.count"])))

    def residual_at(self, level: float, count: int) -> float:
        """How far ``count`` images of this data set lie from its key: on a line between the logarithms."""
        known = self.residuals[LEVELS.index(level)].double().clamp(min=1e-12).log()

        def noise(n: int) -> float:
            return math.log(1 / n + 1 / self.count)

        x, at = noise(count), [noise(n) for n in COUNTS]  # falling
        if x >= at[0] or x <= at[-1]:
            end = 0 if x >= at[0] else -1
            return math.exp(float(known[end]) + 0.5 * (x - at[end]))
        right = next(i for i, value in enumerate(at) if value <= x)
        share = (x - at[right - 1]) / (at[right] - at[right - 1])
        return math.exp(float(known[right - 1]) * (1 - share) + float(known[right]) * share)


def key_of(batches: Iterable[Tensor], space: Space, *, measure: bool = True) -> Key:
    """The key of features phi that come in batches (B, D); with ``measure`` its residuals too.

    Memory does not grow with the number of images: the residuals are those of the first KEPT.

    Raises:
        DataError: no features, or too few to measure.
    """
    count, total = 0, torch.zeros(space.features, dtype=torch.float64)
    first, second, rows = torch.zeros(()), torch.zeros(()), list[Tensor]()
    for phi in batches:
        psi = space.psi(phi)
        total += psi.double().sum(0)
        first, second = first + phi.double().sum(0), second + phi.double().square().sum(0)
        if measure and count < KEPT:
            rows.append(psi[: KEPT - count])
        count += len(phi)
    if not count:
        raise DataError("no images given; a key is of at least one")
    centre = first / count
    variance = (second / count - centre.square()).clamp(min=0)
    found = residuals(torch.cat(rows), count, space.seed) if measure else torch.zeros(len(LEVELS), len(COUNTS))
    return Key((total / count).float(), centre.float(), variance.float(), found, count)


def residuals(psi_NR: Tensor, whole_count: int, seed: int) -> Tensor:
    """(levels, counts) quantiles of |mean of n rows - mean of the others| over DRAWS draws.

    The others are fewer than the ``whole_count`` images of the key, and where fewer than 2 n rows are there, half of
    them are drawn: what is found is scaled from sqrt(1/drawn + 1/others) to sqrt(1/n + 1/whole_count).

    Raises:
        DataError: fewer than LEAST rows.
    """
    count = len(psi_NR)
    if count < LEAST:
        raise DataError(f"{count} images given; at least {LEAST} are needed, to know how far ten of them may lie")
    generator, columns = torch.Generator().manual_seed(seed_of("residuals", seed)), []
    whole = psi_NR.sum(0)
    for n in COUNTS:
        drawn, picked_WN = min(n, count // 2), torch.zeros(DRAWS, count)
        for row in picked_WN:
            row[torch.randperm(count, generator=generator)[:drawn]] = 1
        part_WR = picked_WN.to(psi_NR) @ psi_NR
        apart = (part_WR / drawn - (whole - part_WR) / (count - drawn)).norm(dim=1).double()
        scale = math.sqrt((1 / n + 1 / whole_count) / (1 / drawn + 1 / (count - drawn)))
        columns.append(apart.quantile(torch.tensor(LEVELS, dtype=torch.float64)) * scale)
    return torch.stack(columns, dim=1).float()
