"""Which data sets a task looks like: a sparse convex combination of their keys, by matching kernel means.

    min |m - sum_t w_t m_t|   over  w >= 0,  sum w = 1,  at most k of them above 0

greedily: the key that leaves least once all weights are fitted anew joins, until k have, or less than 2 % is gained, or
what is left is no more than samples of these data sets leave of themselves (our addition: beyond that the next key
would fit the noise of few images). The specification of a matching pursuit takes the key with the largest
product with what is left; that prefers the keys of narrow data sets, which are longer, and here costs as much.

Least squares with w >= 0 and a row sqrt(rho) sum w = sqrt(rho) is solved exactly, by trying every set of positive
weights: there are few.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import combinations

import torch
from torch import Tensor

MAX_K = 8
RHO = 1e3  # weight of the sum being 1
GAIN = 0.02  # share of what is left that another key has to take away


def convex_weights(target_R: Tensor, keys_KR: Tensor) -> Tensor:
    """The w (K,) of the least |target - w keys|, at least 0 each and 1 together; float64."""
    keys, target = keys_KR.double(), target_R.double()
    gram, product = keys @ keys.T + RHO, keys @ target + RHO
    best, found = float("inf"), torch.zeros(len(keys), dtype=torch.float64)
    for size in range(1, len(keys) + 1):
        for chosen in combinations(range(len(keys)), size):
            index = torch.tensor(chosen)
            w = torch.linalg.lstsq(gram[index][:, index], product[index, None], driver="gelsd").solution[:, 0]
            if float(w.min()) < 0:
                continue
            error = float(w @ gram[index][:, index] @ w - 2 * w @ product[index])
            if error < best - 1e-12:
                best, found = error, torch.zeros_like(found).index_copy(0, index, w)
    return found / found.sum()


def matched(
    target_R: Tensor, keys_TR: Tensor, k: int, enough: Callable[[Sequence[int]], float]
) -> tuple[dict[int, float], float]:
    """(number of a key -> its share, what is left) of the combination described above.

    ``enough`` says of a set of keys how much of a task like them is left as a rule.
    """
    chosen: list[int] = []
    shares, left = torch.zeros(0, dtype=torch.float64), float("inf")
    while len(chosen) < min(k, len(keys_TR)):
        tried = []
        for t in range(len(keys_TR)):
            if t not in chosen:
                w = convex_weights(target_R, keys_TR[[*chosen, t]])
                tried.append((float((target_R.double() - w @ keys_TR[[*chosen, t]].double()).norm()), t, w))
        least, t, w = min(tried, key=lambda item: (item[0], -item[1]))  # of two of the same images the newer
        if chosen and (left - least < GAIN * left or left <= enough(chosen)):
            break
        chosen, shares, left = [*chosen, t], w, least
    return {t: float(w) for t, w in zip(chosen, shares, strict=True) if w > 0}, left
