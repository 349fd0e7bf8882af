"""Plainer Newton-Schulz steps, as a measure of the library's."""
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


# from the published arithmetic to the library's
FORMS = {"published steps": published_steps, "twelve products": twelve_products,
         "gradient by hand": None}


def in_form(step, newton_schulz):
    "The function `step`, during which every deconvolution takes other Newton-Schulz steps."
    if newton_schulz is None: return step
    @wraps(step)
    def replaced():
        with patch("specpred.deconv.newton_schulz", newton_schulz): return step()
    return replaced
