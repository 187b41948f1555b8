"""What a selection is to be compared with: simpler rules of which entries to add, and how much. Private to ``pool.py``.

``anchor``   nothing
``soup``     every entry, 1 / T of each of T
``nearest``  the one whose key is nearest to the task's, whole; no labels are needed
``logme``    the one with whose features a linear model explains the labels best, whole
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from learngene_hub import _pool_features
from learngene_hub._pool_amounts import Mixture
from learngene_hub.data import Images
from learngene_hub.errors import SettingsError
from learngene_hub.methods._adaptive_key import Key

if TYPE_CHECKING:
    from learngene_hub.pool import Pool

RULES = ("tals", "logme", "nearest", "soup", "anchor")
_ROUNDS, _CLOSE = 100, 1e-6  # of the fixed point of LogME


def simple(
    pool: Pool, rule: str, model: nn.Module, task: Images, key: Key, *, labelled: bool
) -> tuple[dict[str, float], dict[str, float]]:
    """(sha256 -> weight, the score of each entry by its name) of one of these rules.

    Raises:
        SettingsError: an unknown rule, or one that needs labels where there are none.
    """
    if rule not in RULES[1:]:
        raise SettingsError(f"rule {rule!r:.80} asked; there are {', '.join(RULES)}")
    rows = pool.manifest.entries
    if rule == "anchor":
        return {}, {}
    if rule == "soup":
        return {row.sha256: 1 / len(rows) for row in rows}, {}
    if rule == "logme" and not labelled:
        raise SettingsError("rule 'logme' asked without labels; 'nearest' needs none")
    scores = {}
    for row, learngene in pool.entries():
        if rule == "nearest":
            scores[row.name] = -float((Key.of(learngene.tensors).mean - key.mean).norm())
        else:
            state = Mixture.of(pool, [row.sha256], model).state(torch.ones(1))
            seen = _pool_features.features(model, task, pool.anchor, state)
            scores[row.name] = logme(seen, task.labels, len(task.classes))
    best = max(reversed(scores), key=lambda name: scores[name])  # of equal ones the newer
    return {pool.row(best).sha256: 1.0}, {name: round(score, 6) for name, score in scores.items()}


def logme(features_ND: Tensor, labels_N: Tensor, classes: int) -> float:
    """The mean over classes of max_(a, b) log p(y | F, a, b) / N: y = F w + noise, w ~ N(0, 1/a), noise ~ N(0, 1/b), y
    being 1 for the images of the class, else 0.

    Source: You, Liu, Wang, Long, "LogME", ICML 2021, arXiv:2102.11005, by the fixed point of its algorithm 1 on the
    singular values of F.
    """
    u_NK, s_K, _ = torch.linalg.svd(features_ND.double(), full_matrices=False)
    count, width = features_ND.shape
    evidences = [_evidence((labels_N == label).double(), u_NK, s_K.square(), count, width) for label in range(classes)]
    return sum(evidences) / classes


def _evidence(y_N: Tensor, u_NK: Tensor, squares_K: Tensor, count: int, width: int) -> float:
    inside_K = (u_NK.T @ y_N).square()
    outside = max(0.0, float(y_N.square().sum() - inside_K.sum()))  # of y, what no feature reaches
    a = b = 1.0
    for _ in range(_ROUNDS):
        t = a / b
        shrunk_K = squares_K / (squares_K + t)
        gamma = float(shrunk_K.sum())
        size = float((squares_K * inside_K / (squares_K + t).square()).sum())  # |m|^2
        error = float(((1 - shrunk_K).square() * inside_K).sum()) + outside
        a, b = gamma / (size + 1e-10), (count - gamma) / (error + 1e-10)
        if abs(a / b - t) <= _CLOSE * t:
            break
    t = a / b
    size = float((squares_K * inside_K / (squares_K + t).square()).sum())
    error = float(((t / (squares_K + t)).square() * inside_K).sum()) + outside
    logs = float((a + b * squares_K).log().sum()) + (width - len(squares_K)) * math.log(a)
    told = width * math.log(a) + count * math.log(b) - logs - b * error - a * size - count * math.log(2 * math.pi)
    return told / (2 * count)
