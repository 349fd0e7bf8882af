"""Lines of real SDSS galaxies by three fits: SDSS's pipeline, this library, and pPXF (Cappellari
2023) with the E-MILES models (Vazdekis et al. 2016): another program and other models of stellar
populations, which are built from MILES's spectra of stars as those of this library are.

pPXF is not among the dependencies (its licence is for non-commercial use). Release 8.2.6 contains
the E-MILES spectra: `pip install --no-deps ppxf==8.2.6`. With NumPy 2.4 and later the line
`m = int(np.diff(ln_lim)/ln_scale)` of its log_rebin needs `np.diff(ln_lim).item()`."""
import sys
import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import numpy as np
from astropy.io import fits
from real_spectra import command_line, row, spectra_paths

from specpred.formats import DLOGLAM, air_to_vacuum, read_sdss
from specpred.lines import measure_spectra
from specpred.populations import LIGHT_SPEED
from specpred.spectra import prepare

RESULTS = Path(__file__).with_suffix(".md")
LINES = {"Hβ": ("hbeta", "H_beta", "Hbeta"), "[O III] 5007": ("oiii_5007", "[O_III] 5007",
    "[OIII]5007_d"), "Hα": ("halpha", "H_alpha", "Halpha"), "[N II] 6584": ("nii_6584",
    "[N_II] 6583", "[NII]6583_d")}  # column here, name in SPZLINE, name of pPXF
RESOLUTION = 2.76  # Angstrom, FWHM of SDSS's spectrograph as pPXF's examples take it


class Measured(NamedTuple):
    "Flux of a line and its error, 1e-17 erg/s/cm2."
    flux: float
    error: float

    def __str__(self): return f"{self.flux:.0f} ± {self.error:.0f}"


def of_sdss(path):
    "The lines in HDU 3, which SDSS's pipeline measured."
    with fits.open(path) as hdus: rows = {line["LINENAME"].strip(): line for line in hdus[3].data}
    return {label: Measured(rows[name]["LINEAREA"], rows[name]["LINEAREA_ERR"])
        for label, (_, name, _) in LINES.items()}


def _labelled(table):
    first = table.iloc[0]
    return {label: Measured(first[f"{name}_flux"], first[f"{name}_flux_err"])
        for label, (name, *_) in LINES.items()}


def of_library(path):
    "This library's lines on SDSS's pixels, and on the common grid."
    spectrum = read_sdss(path)
    z, known = spectrum.redshift, spectrum.ivar > 0
    error = np.divide(1, np.sqrt(spectrum.ivar), where=known, out=np.zeros(len(known)))
    native = measure_spectra(spectrum.flux, error, spectrum.loglam0 - np.log10(1 + z), DLOGLAM,
        redshift=z)
    bins = prepare([spectrum])
    coarse = measure_spectra(bins.flux, bins.error, missing=bins.missing, redshift=z)
    return _labelled(native), _labelled(coarse)


def _templates(wavelength, step):
    "Stars of pPXF's E-MILES spectra and its emission lines, for pixels of `step` km/s, in air."
    from ppxf import miles_util, ppxf_util
    folder = Path(find_spec("ppxf").origin).parent/"miles_models"
    miles = miles_util.miles(str(folder/"Eun1.30*.fits"), step, RESOLUTION, norm_range=[5070, 5950])
    stars = miles.templates.reshape(len(miles.templates), -1)
    gas, names, centres = ppxf_util.emission_lines(miles.ln_lam_temp, wavelength[[0, -1]],
        RESOLUTION)
    return stars/np.median(stars), gas, names, centres, miles.lam_temp


def of_ppxf(path):
    "pPXF's lines: stars and gas fitted together from 3545 to 7400 Angstrom, as in its examples."
    from ppxf.ppxf import ppxf
    spectrum = read_sdss(path)
    z = spectrum.redshift
    rest = spectrum.wavelength/(1 + z)
    in_air = rest*np.median(rest/air_to_vacuum(rest))  # one factor, to keep the pixels logarithmic
    used = (in_air > 3545) & (in_air < 7400)
    wavelength, ivar = in_air[used], spectrum.ivar[used].astype(float)
    level = np.median(spectrum.flux[used])
    good, flux = ivar > 0, spectrum.flux[used].astype(float)/level
    noise = np.divide(1/level, np.sqrt(ivar), where=good, out=np.ones(len(ivar)))
    step = LIGHT_SPEED*np.log(10)*DLOGLAM
    stars, gas, names, centres, template_wavelength = _templates(wavelength, step)
    component = np.repeat([0, 1], [stars.shape[1], len(names)])
    fit = ppxf(np.hstack([stars, gas]), flux, noise, step, [[0, 180.], [0, 120.]], moments=[2, 2],
        bounds=[[[-500, 500], [20, 500]], [[-300, 300], [1, 350]]], degree=-1, mdegree=10,
        lam=wavelength, lam_temp=template_wavelength, component=component,
        gas_component=component > 0, gas_names=names, goodpixels=np.flatnonzero(good), quiet=True)
    # its fluxes are sums over pixels, and those of doublets of both lines, 1 : 1/3
    unit = level*(1 + z)*centres*np.log(10)*DLOGLAM
    unit = unit/np.where([name.endswith("_d") for name in names], 4/3, 1)
    fluxes = dict(zip(names, map(Measured, fit.gas_flux*unit, fit.gas_flux_error*unit),
        strict=True))
    return {label: fluxes[name] for label, (*_, name) in LINES.items()}


INTRODUCTION = """# Lines of real galaxies by three fits

Made by `real_lines.py`. Fluxes in 1e-17 erg/s/cm² with formal errors, of the galaxies below \
redshift 0.36 among the real spectra, all lines whether strong or not. SDSS is LINEAREA of the \
spectrum's file (HDU 3); pPXF is version 8.2.6 with E-MILES models (Vazdekis et al. 2016), and \
fits no negative lines. What MPA-JHU or Portsmouth measured in these galaxies was not at hand.

| spectrum | line | SDSS | native pixels | common grid | pPXF |
|---|---|---|---|---|---|"""


def main():
    paths, _ = spectra_paths(command_line(__doc__))
    if not find_spec("ppxf"): sys.exit("there is no pPXF: pip install --no-deps ppxf==8.2.6")
    warnings.simplefilter("ignore")  # of pPXF's older numpy calls
    rows = []
    for path in paths:
        if read_sdss(path).redshift > 0.36: continue
        fits_of_it = of_sdss(path), *of_library(path), of_ppxf(path)
        rows += [row(path.stem, label, *(fit[label] for fit in fits_of_it)) for label in LINES]
    text = "\n".join([INTRODUCTION, *rows])
    RESULTS.write_text(text + "\n")
    print(text)


if __name__ == "__main__": main()
