"""Real SDSS galaxies through an autoencoder that was trained on mock ones: what it cannot
reconstruct, and where. `specpred reproduce` has to have made the profile up to 21_vae. Reads
spec-*.fits below the folder that SPECPRED_REAL_DATA or --data names."""
from pathlib import Path
from typing import NamedTuple

import numpy as np
from real_spectra import command_line, row, spectra_paths
from scipy.ndimage import gaussian_filter1d
from scipy.optimize import nnls

from specpred.config import get_paths, get_profile
from specpred.eigenspectra import SpectrumBasis, fill, load_store
from specpred.formats import read_sdss
from specpred.populations import FINE_STEP, LIGHT_SPEED, FineBasis, StellarLibrary
from specpred.spectra import GRID, prepare, rebin
from specpred.vae import SpectrumModel

RESULTS = Path(__file__).with_suffix(".md")
LARGEST_REDSHIFT = 0.36  # beyond, too little of the grid is observed
WINDOWS = {  # vacuum Angstrom, first and last
    "lines": ((3720, 3737), (4850, 4875), (4950, 4970), (4998, 5018), (6540, 6600), (6705, 6745)),
    "Na D": ((5880, 5910),), "Mg b, Fe": ((5150, 5350),), "TiO": ((7050, 7300),),
    "below 4000 Å": ((3000, 4000),), "beyond 7300 Å": ((7300, 9000),)}


class Residual(NamedTuple):
    "A spectrum minus a model, in the bins that were measured."
    wavelength: np.ndarray  # Angstrom
    residual: np.ndarray  # over the spectrum's mean flux
    error: np.ndarray  # the same unit

    @property
    def excess(self):
        "RMS that the noise does not explain, relative to the mean flux."
        return np.sqrt(max((self.residual**2 - self.error**2).mean(), 0))

    @property
    def reduced_chi2(self): return ((self.residual/self.error)**2).mean()


def shares_of_excess(residual):
    "Which share of the squared excess is smooth, and what of the rest is in each window."
    wavelength = residual.wavelength
    def inside(*windows):
        return np.any([(wavelength > a) & (wavelength < b) for a, b in windows], axis=0)
    in_line = inside(*WINDOWS["lines"])
    # smooth over 30 bins, without the lines
    kept = np.where(in_line, 0, residual.residual)
    smooth = gaussian_filter1d(kept, 30)/gaussian_filter1d(1.0 - in_line, 30)
    total = (residual.residual**2 - residual.error**2).sum()
    rest = (residual.residual - smooth)**2 - residual.error**2
    shares = {"shape": (smooth**2).sum()/total}
    shares |= {name: rest[inside(*windows)].sum()/total for name, windows in WINDOWS.items()}
    return shares


def library_templates(sigma):
    "(T, n_bins) of single populations with dust, and of lines, broadened by `sigma` km/s."
    library = StellarLibrary.load()
    fine = FineBasis.of(library)
    ages = [np.abs(library.age - age).argmin() for age in np.geomspace(1e6, 12e9, 17)]
    stars = library.coefficients[ages].reshape(-1, library.basis.shape[0]) @ fine.basis
    stars = np.concatenate([stars*10**(-0.4*av*fine.dust) for av in (0, 0.5, 1, 2)])
    within = (library.line_wavelength > GRID.edges[0]) & (library.line_wavelength < GRID.edges[-1])
    centres = np.log10(library.line_wavelength[within])
    velocity = LIGHT_SPEED*np.log(10)*(fine.loglam - centres[:, None])
    lines = np.exp(-0.5*(velocity/130)**2)
    stars = gaussian_filter1d(stars, sigma/(LIGHT_SPEED*np.log(10)*FINE_STEP), axis=1)
    templates = rebin(np.concatenate([stars, lines]), None, fine.loglam[0], dloglam=FINE_STEP).flux
    return templates/templates.mean(1, keepdims=True)


def fit_library(flux, error, templates):
    "The best sum of templates, with weights that are not negative."
    weight = 1/np.hypot(error, 0.01*flux.mean())
    amounts, _ = nnls((templates*weight).T, flux*weight, maxiter=5000)
    return amounts @ templates


class Reconstructed(NamedTuple):
    name: str
    s_n: float  # a bin, median
    vae: Residual
    eigenspectra: Residual
    library: Residual


def reconstruct(path, model, basis, templates):
    "One spectrum's residuals from the autoencoder, the mock's eigenspectra and the library."
    spectrum = prepare([read_sdss(path)])
    filled = fill(spectrum.flux, spectrum.missing, basis)
    good = ~spectrum.missing[0]
    flux, error, norm = spectrum.flux[0, good], spectrum.error[0, good], filled.norms[0]
    fits = [fit_library(flux, error, some[:, good]) for some in templates]
    best = min(fits, key=lambda fit: (((flux - fit)/error)**2).sum())
    models = (model.reconstruct(filled.normalised)[0, good]*norm,
        (basis.mean + filled.coefficients[0] @ basis.eigenvectors)[good]*norm, best)
    residuals = [Residual(GRID.wavelength[good], (flux - values)/flux.mean(), error/flux.mean())
        for values in models]
    return Reconstructed(path.stem, np.median(flux/error), *residuals)


INTRODUCTION = """# Real galaxies through a mock-trained autoencoder

Made by `real_reconstruction.py` from the profile `{profile}` with {n} spectra. Real spectra below \
redshift 0.36 go through the autoencoder's ten latents and back. The excess is the RMS of the \
residuals over that of the noise, $\\sqrt{{\\langle r^2\\rangle - \\langle\\sigma^2\\rangle}}$, \
relative to the mean flux. Two comparisons say where a large excess comes from: ten eigenspectra \
of the mock spectra, fitted to the real one; and the best sum of single populations of the \
stellar library, each with its own dust, and free lines, which is what no population drawn from \
the library can beat.

| spectrum | S/N a bin | excess, % | reduced χ² | eigenspectra, % | library, % |
|---|---|---|---|---|---|"""

FEATURES = """
## Where it is missing

Shares of the autoencoder's squared excess in percent: what is smooth over 30 bins (the shape of \
the continuum), and of the remainder that in windows. Windows of lines hold emission and the \
Balmer absorption beneath it.

| spectrum | {names} |
|---|{rules}|"""


def report(results, profile, n):
    "The text of the results."
    lines = [row(r.name, f"{r.s_n:.0f}", f"{100*r.vae.excess:.1f}", f"{r.vae.reduced_chi2:.1f}",
        f"{100*r.eigenspectra.excess:.1f}", f"{100*r.library.excess:.1f}") for r in results]
    medians = [f"{100*np.median([getattr(r, name).excess for r in results]):.1f}"
        for name in ("vae", "eigenspectra", "library")]
    shares = [shares_of_excess(r.vae) for r in results]
    where = [row(r.name, *(f"{100*share:.0f}" for share in of_one.values()))
        for r, of_one in zip(results, shares, strict=True)]
    return "\n".join([INTRODUCTION.format(profile=profile, n=n), *lines,
        row("median", "", medians[0], "", *medians[1:]),
        FEATURES.format(names=" | ".join(shares[0]), rules="|".join(["---"]*len(shares[0]))),
        *where])


def main():
    parser = command_line(__doc__)
    parser.add_argument("--data-dir", help="folder that holds <profile>/, as of `specpred`")
    parser.add_argument("--profile", default="demo")
    paths, chosen = spectra_paths(parser)
    run = get_paths(get_profile(chosen.profile), chosen.data_dir)
    store, model = load_store(run.spectra), SpectrumModel.load(run.vae)
    n_iter = get_profile(chosen.profile).spectra.n_iter
    basis = SpectrumBasis(store.mean, store.eigenvectors, store.eigenvalues, n_iter, "l2",
        len(store.flux))
    templates = [library_templates(sigma) for sigma in (100, 170, 230)]
    results = [reconstruct(path, model, basis, templates) for path in paths
        if read_sdss(path).redshift < LARGEST_REDSHIFT]
    text = report(results, chosen.profile, len(store.flux))
    RESULTS.write_text(text + "\n")
    print(text)


if __name__ == "__main__": main()
