"""The sum of a pool's anchor and some of its increments. Private to ``pool.py``; the algebra is that of
``methods/_adaptive_merge.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from torch import Tensor

from learngene_hub._check import is_number
from learngene_hub._pool_select import Selection
from learngene_hub.errors import SettingsError
from learngene_hub.methods._adaptive_merge import add_scaled, flattened, merged_tensors
from learngene_hub.methods.adaptive import Adaptive

if TYPE_CHECKING:
    from learngene_hub.pool import Pool

MOST = 10  # times an increment may be added: as many as of a parent in the file of an entry


def weights_of(pool: Pool, selection: Selection | Mapping[str, float]) -> dict[str, float]:
    """sha256 -> weight, of a selection, or of weights by name or sha256 that a user wrote down.

    Raises:
        SettingsError: a selection from another pool, an entry that is named twice, or a weight that is no number from
            -MOST to MOST.
        RegistryError: an entry that is not there.
    """
    if isinstance(selection, Selection):
        if selection.anchor != pool.manifest.anchor.sha256:
            raise SettingsError(
                f"a selection from a pool on the anchor {selection.anchor[:12]} given; this pool's is "
                f"{pool.manifest.anchor.sha256[:12]}: select from this pool"
            )
        return {chosen.sha256: chosen.weight for chosen in selection.entries}
    if not isinstance(selection, Mapping):
        raise SettingsError(f"selection {selection!r:.80} given; a Selection, or {{NAME: WEIGHT}}, would work")
    weights: dict[str, float] = {}
    for name, weight in selection.items():
        row = pool.row(name)
        if row.sha256 in weights:
            raise SettingsError(f"entry {row.name} given twice; once would work")
        if not is_number(weight) or not abs(weight) <= MOST:
            raise SettingsError(f"weight {weight!r:.40} of {name} given; a number from -{MOST} to {MOST} would work")
        weights[row.sha256] = float(weight)
    return weights


def merged(pool: Pool, weights: Mapping[str, float]) -> dict[str, Tensor]:
    """The anchor's tensors with these weights (by sha256) of increments and their parents added."""
    total: dict[str, Tensor] = {}
    if weights:
        for sha256, weight in flattened(weights, _family(pool, weights)).items():
            add_scaled(total, pool.read(sha256).group("increment"), weight)
    return merged_tensors(pool.anchor, total, pool.table()) if total else dict(pool.anchor.tensors)


def _family(pool: Pool, weights: Mapping[str, float]) -> dict[str, Adaptive]:
    """The settings of these entries, and of all that stand before them where some have parents."""
    if pool.manifest.topology != "star":  # an entry of a star has no parents, see ``Pool.require``
        return pool.methods()
    wanted = {pool.row(sha256).sha256 for sha256 in weights}
    return {row.sha256: pool.require(pool.read(row.sha256)) for row in pool.manifest.entries if row.sha256 in wanted}
