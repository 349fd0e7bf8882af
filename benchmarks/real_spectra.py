"""Real SDSS spectra through the same steps as the mock's, compared bin by bin with the observed flux, and their lines with those of SDSS's
pipeline. Reads spec-*.fits below the folder that SPECPRED_REAL_DATA or --data names; the files stay outside of this repository."""
import argparse, os
from pathlib import Path

import numpy as np
from astropy.io import fits

from specpred.lines import measure_spectra
from specpred.spectra import DLOGLAM, LogGrid, noise_spikes, prepare, read_sdss, rebin

RESULTS = Path(__file__).with_suffix(".md")
LINES = {"[O II] 3727": ("oii_3727", "[O_II] 3725", "[O_II] 3727"), "Hβ": ("hbeta", "H_beta"), "[O III] 5007": ("oiii_5007", "[O_III] 5007"),
    "Hα": ("halpha", "H_alpha"), "[N II] 6584": ("nii_6584", "[N_II] 6583"), "[S II] 6717, 6731": ("sii_6717_31", "[S_II] 6716", "[S_II] 6730")}


def mean_between(edges, flux, good, lo, hi):
    "Mean flux density of the measured part of a bin, pixel by pixel, without any of the library's code."
    total = width = 0.
    for i in np.flatnonzero((edges[1:] > lo) & (edges[:-1] < hi) & good):
        overlap = min(edges[i + 1], hi) - max(edges[i], lo)
        total, width = total + flux[i]*overlap, width + overlap
    return total/width


def compare_bins(spectrum, grid):
    "Of one spectrum: bins kept, largest difference to the direct mean in units of the error, published over propagated error, and bins that either rule masks."
    kept = prepare([spectrum])
    published = rebin(spectrum.flux, spectrum.ivar, spectrum.loglam0, spectrum.redshift, error="published")
    edges = 10**(spectrum.loglam0 + DLOGLAM*(np.arange(len(spectrum.flux) + 1) - 0.5))/(1 + spectrum.redshift)
    good, bins = spectrum.ivar > 0, np.flatnonzero(~kept.missing[0])
    direct = np.array([mean_between(edges, spectrum.flux.astype(float), good, grid.edges[j], grid.edges[j + 1]) for j in bins])
    native = np.interp(np.log10(grid.wavelength[bins]*(1 + spectrum.redshift)), spectrum.loglam[good], spectrum.ivar[good]**-0.5)
    return dict(bins=len(bins), difference=np.abs(direct - kept.flux[0, bins]).max()/np.median(kept.error[0, bins]),
        ratio=np.median(published.error[0, bins]/kept.error[0, bins]), native=np.median(published.error[0, bins]/native),
        published_bins=int((~noise_spikes(published, spare_lines=False))[0].sum()))


def compare_lines(path, spectrum):
    "Rows of the table of lines that SDSS measured with area/error above 10."
    with fits.open(path) as hdus: theirs = {row["LINENAME"].strip(): row for row in hdus[3].data}
    z, error = spectrum.redshift, np.where(spectrum.ivar > 0, np.maximum(spectrum.ivar, 1e-30)**-0.5, 0)
    binned = prepare([spectrum])
    native = measure_spectra(spectrum.flux, error, spectrum.loglam0 - np.log10(1 + z), DLOGLAM, redshift=z).iloc[0]
    coarse = measure_spectra(binned.flux, binned.error, missing=binned.missing, redshift=z).iloc[0]
    for label, (name, *parts) in LINES.items():
        area, sigma = sum(theirs[p]["LINEAREA"] for p in parts), np.hypot.reduce([theirs[p]["LINEAREA_ERR"] for p in parts])
        if area < 10*sigma or not np.isfinite(native[f"{name}_flux"]): continue
        values = [f"{table[f'{name}_flux']:.0f} ± {table[f'{name}_flux_err']:.0f}" for table in (native, coarse)]
        yield f"| {path.stem} | {label} | {area:.0f} ± {sigma:.0f} | {values[0]} | {values[1]} | {native[f'{name}_flux']/area:.2f} |"


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=os.environ.get("SPECPRED_REAL_DATA"), help="folder with spec-*.fits, at any depth")
    chosen = parser.parse_args()
    paths = sorted(Path(chosen.data).rglob("spec-*.fits")) if chosen.data else []
    if not paths: parser.error("no spec-*.fits: name their folder with --data or SPECPRED_REAL_DATA")
    lines, bins, grid = [], [], LogGrid()
    for path in paths:
        spectrum = read_sdss(path)
        found = compare_bins(spectrum, grid)
        bins.append(f"| {path.stem} | {spectrum.redshift:.4f} | {found['bins']} | {found['published_bins']} | {found['difference']:.0e} | {found['ratio']:.2f} | {found['native']:.2f} |")
        if spectrum.redshift < 0.36: lines += compare_lines(path, spectrum)
    text = ["# Real SDSS spectra through the pipeline", "", "Made by `real_spectra.py`.", "", "## Bin by bin", "",
        "Each bin's flux against the mean of the observed pixels in it, summed up one by one; published error (mean of the pixels' errors) against the propagated one, "
        "and against the observed pixels' error at that wavelength.", "",
        "| spectrum | redshift | bins kept | kept by the published masks | largest difference, σ | published / propagated error | published / pixel's error |", "|---|---|---|---|---|---|---|", *bins, "",
        "## Lines", "", "Fluxes in 1e-17 erg/s/cm² of lines that SDSS's pipeline found with more than ten times their error. Its Balmer lines differ by as much as its template's "
        "absorption does: at Hα of the first spectrum the template's continuum is 10 % above that of the starlight fitted here.", "",
        "| spectrum | line | SDSS | native pixels | common grid | native / SDSS |", "|---|---|---|---|---|---|", *lines]
    RESULTS.write_text("\n".join(text) + "\n")
    print("\n".join(text))


if __name__ == "__main__": main()
