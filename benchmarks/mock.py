"""What mock galaxies cost: images at two sizes beside two Sersic profiles drawn by GalSim, their
accuracy, and spectra into files and into the store."""
import argparse
import os
import platform
import tempfile
import time
from pathlib import Path

import galsim
import numpy as np
import psutil
from threadpoolctl import threadpool_limits

from specpred.config import MockParameters, SpectraParameters
from specpred.eigenspectra import build_store
from specpred.mock_light import SDSS_EXTINCTION, draw_light, galaxy_image
from specpred.mock_survey import make_survey, stellar_library
from specpred.surveys import PS1

SEEING = np.array(PS1.seeing)


def two_profiles(galaxy, band, seeing, size):
    "A bulge and a disk by GalSim, which was the whole galaxy before."
    fluxes = galaxy.bulge_light, 1 - galaxy.bulge_light
    profiles = [
        galsim.Sersic(n=galaxy.bulge_sersic, half_light_radius=galaxy.bulge_radius, flux=fluxes[0]),
        galsim.Exponential(scale_radius=galaxy.disk_scale, flux=fluxes[1]).shear(
            q=galaxy.axis_ratio, beta=galaxy.angle*galsim.degrees)]
    fast = galsim.GSParams(folding_threshold=1e-2, maxk_threshold=3e-3)
    moffat = galsim.Moffat(beta=3, fwhm=seeing)
    blurred = galsim.Convolve(galsim.Add(profiles), moffat, gsparams=fast)
    return blurred.drawImage(nx=size, ny=size, scale=PS1.pixel_scale, dtype=np.float32).array


def cpu_milliseconds(function, n):
    start = time.process_time()
    for k in range(n): function(k)
    return 1e3*(time.process_time() - start)/n


def image_rows(light, n):
    """CPU milliseconds of the five images of a galaxy, in turns: maps with one seeing for all, maps
    with a seeing of their own, and GalSim."""
    galaxies, rows = list(light.galaxies.itertuples()), []
    for size in (64, 224):
        galaxy_image(light, 0, SEEING, size)
        maps, own_seeing, by_galsim = [], [], []
        for start in range(0, n, 20):
            maps.append(cpu_milliseconds(
                lambda k, s=start, size=size: galaxy_image(light, s + k, SEEING, size), 20))
            own_seeing.append(cpu_milliseconds(lambda k, s=start, size=size: galaxy_image(
                light, s + k, SEEING*(1.01 + (s + k)/n), size), 20))
            by_galsim.append(cpu_milliseconds(lambda k, s=start, size=size: [
                two_profiles(galaxies[s + k], b, w, size)
                for b, w in zip("grizy", SEEING, strict=True)], 20))
        maps, own_seeing, by_galsim = map(np.median, (maps, own_seeing, by_galsim))
        rows.append((size, maps, 1e3/maps, own_seeing, by_galsim, by_galsim/maps))
    return rows


def largest_differences(light, n):
    "Largest difference of a pixel over the peak, galaxy by galaxy, to a grid four times as fine."
    errors = []
    for k in range(n):
        offset = np.random.default_rng(k).uniform(-0.5, 0.5, 2)
        image, better = (galaxy_image(light, k, SEEING, 64, offset=offset, fine=f) for f in (2, 8))
        errors.append((np.abs(image - better)/better.max((1, 2), keepdims=True)).max())
    return np.array(errors)


def spectra_seconds(n):
    "Elapsed seconds from nothing to files, and from files into the store, with all cores."
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        start = time.perf_counter()
        truth = make_survey(MockParameters(n_spectra_only=n), folder/"mock", 1, progress=False)
        made = time.perf_counter()
        catalogue = truth.assign(has_spectrum=True, split="train", redshift=truth.z_observed,
            extinction_r=SDSS_EXTINCTION["r"]*truth.ebv)
        flat = folder/"raw"
        flat.mkdir()
        for path in (folder/"mock"/"sas").rglob("spec-*.fits"): os.link(path, flat/path.name)
        linked = time.perf_counter()
        build_store(catalogue, flat, folder/"store", SpectraParameters(), 3.0)
        return made - start, time.perf_counter() - linked


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--galaxies", type=int, default=200, help="of the images")
    parser.add_argument("--spectra", type=int, default=8000)
    chosen = parser.parse_args()
    load = os.getloadavg()[0]
    light = draw_light(stellar_library(), chosen.galaxies, 1, "benchmark")
    with threadpool_limits(1):  # as `make_survey` does; the time of idle threads counts too
        rows = image_rows(light, chosen.galaxies)
        errors = largest_differences(light, chosen.galaxies)
    few, n = np.array(spectra_seconds(1000)), chosen.spectra
    many = np.array(spectra_seconds(n))
    made, stored = (many - few)/(n - 1000)  # seconds each, without those that the start takes
    whole = few.sum() + (64_000 - 1000)*(made + stored)
    median, high, worst = 100*np.quantile(errors, [0.5, 0.99, 1])
    lines = ["# What mock galaxies cost\n", "Made by `mock.py`.\n",
        f"{platform.processor() or platform.machine()}, {psutil.cpu_count()} cores, "
        f"Python {platform.python_version()}, load before: {load:.1f}.\n",
        "## Images\n",
        "CPU time of five bands of a galaxy; GalSim draws two profiles, in turns with the maps. "
        "The transform of the seeing is kept for galaxies that share it.\n",
        "| pixels | maps, ms | galaxies/s a core | with a seeing of its own, ms "
        "| two profiles, ms | two profiles / maps |",
        "|---|---|---|---|---|---|",
        *(f"| {s} | {m:.1f} | {r:.0f} | {own:.1f} | {g:.1f} | {q:.1f} |"
            for s, m, r, own, g, q in rows),
        "\nLargest difference of any pixel to a grid four times as fine, over the peak: "
        f"median {median:.2f} %, 99th percentile {high:.2f} %, largest of {len(errors)} galaxies "
        f"{worst:.2f} % (arms wound too tightly for the grid).\n",
        "## Spectra\n",
        f"With all cores, elapsed time of {n} galaxies less that of 1000: {1e3*made:.1f} ms to "
        f"draw and observe each, {1e3*stored:.1f} ms to put its file into the store. "
        f"The first 1000 took {few.sum():.0f} s. For 64,000 that makes {whole/60:.1f} minutes.\n"]
    Path(__file__).with_suffix(".md").write_text("\n".join(lines))
    print("\n".join(lines))


if __name__ == "__main__": main()
