"""Plainer arithmetic of deconvolution, as a measure of the library's."""
from functools import wraps
from unittest.mock import patch

import torch


def published_steps(A, n_iter):
    "A^(-1/2) of symmetric matrices of norm 1, three products a step, differentiated by autograd."
    identity = torch.eye(A.shape[-1], dtype=A.dtype, device=A.device)
    Y, Z = A, identity
    for _ in range(n_iter):
        T = 1.5*identity - 0.5*Z @ Y
        Y, Z = Y @ T, T @ Z
    return Z


def twelve_products(A, n_iter):
    "The same steps without the products that nobody uses."
    identity = torch.eye(A.shape[-1], dtype=A.dtype, device=A.device)
    M, Z = A, identity
    for step in range(n_iter):
        T = 1.5*identity - 0.5*M
        Z = Z @ T if step else T
        if step < n_iter - 1: M = M @ T @ T
    return Z


def plain_statistics(X):
    "Mean and covariance of samples, differentiated by autograd."
    mean = X.mean(-1, keepdim=True)
    X = X - mean
    return mean, X @ X.mT/X.shape[-1]


# functions of `specpred.deconv` to replace, from the published arithmetic to the library's
FORMS = {
    "published steps": dict(newton_schulz=published_steps, sample_statistics=plain_statistics),
    "twelve products": dict(newton_schulz=twelve_products, sample_statistics=plain_statistics),
    "gradient of the steps": dict(sample_statistics=plain_statistics),
    "gradient of the covariance": {}}


def in_form(step, functions):
    "The function `step`, during which every deconvolution computes with other `functions`."
    @wraps(step)
    def replaced():
        with patch.multiple("specpred.deconv", **functions): return step()
    return replaced if functions else step
