"Gap filling as published: what `iterative_pca` must equal, and what it is timed against."
import numpy as np


def literal_pca(x, missing, k, n_iter):
    "The recipe word by word, with a full decomposition a turn and a loop over rows."
    filled, measured = np.where(missing, 0, x).astype(float), ~missing
    for _ in range(n_iter):
        filled = filled/np.sqrt((filled**2).sum(1, keepdims=True))
        filled = np.where(missing, (filled*measured).sum(0)/measured.sum(0), filled)
    for _ in range(n_iter):
        filled = filled/np.sqrt((filled**2).sum(1, keepdims=True))
        mean = filled.mean(0)
        _, values, vectors = np.linalg.svd(filled - mean, full_matrices=False)
        fits = [np.linalg.lstsq(vectors[:k, m].T, (row - mean)[m], rcond=None)[0]
            for row, m in zip(filled, measured, strict=True)]
        filled = np.where(missing, fits @ vectors[:k] + mean, filled)
    return filled, mean, vectors[:k], values[:k]
