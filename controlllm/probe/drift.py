"""How far two models' hidden states are apart, on the same tokens."""

import torch
from torch import Tensor

FEWEST = 4
"""Samples that the unbiased estimator needs."""


def drift(before: Tensor, after: Tensor) -> tuple[Tensor, Tensor]:
    """(tokens, hidden) of the base and the tuned model → cosine and ratio of lengths (tuned by base), (tokens,) each.

    In float64. Of a zero state both are nan.
    """
    before, after = before.double(), after.double()
    lengths = torch.linalg.vector_norm(before, dim=-1), torch.linalg.vector_norm(after, dim=-1)
    cosine = (before / lengths[0].unsqueeze(-1) * (after / lengths[1].unsqueeze(-1))).sum(-1)
    return cosine.clamp(-1, 1), lengths[1] / lengths[0]


def linear_cka(x: Tensor, y: Tensor) -> float | None:
    """Centered kernel alignment of (samples, features) and (samples, other features); 1 for the same geometry.

    Linear kernels (Kornblith et al. 2019) and the unbiased estimator of HSIC (Song et al. 2012), which does not depend
    on the number of samples as the plain one does (Nguyen et al. 2021). None for fewer than four samples, or where one
    of them has no structure to align.
    """
    if len(x) < FEWEST:
        return None
    x, y = (states.double() - states.double().mean(0) for states in (x, y))  # changes nothing but the rounding
    own = _hsic(x, x), _hsic(y, y)
    return _hsic(x, y) / (own[0] * own[1]) ** 0.5 if min(own) > 0 else None


def _hsic(x: Tensor, y: Tensor) -> float:
    """From features alone: with n samples and kernels K = xxᵀ, L = yyᵀ without their diagonals,

    (tr KL + 1ᵀK1·1ᵀL1 / ((n-1)(n-2)) - 2·1ᵀKL1 / (n-2)) / (n(n-3))
    """
    n = len(x)
    diagonals = x.square().sum(1), y.square().sum(1)
    sums = x @ x.sum(0) - diagonals[0], y @ y.sum(0) - diagonals[1]  # K1 and L1
    trace = (x.T @ y).square().sum() if n > x.shape[1] else ((x @ x.T) * (y @ y.T)).sum()
    trace = trace - diagonals[0] @ diagonals[1]
    means = sums[0].sum() * sums[1].sum() / ((n - 1) * (n - 2))
    return ((trace + means - 2 * (sums[0] @ sums[1]) / (n - 2)) / (n * (n - 3))).item()
