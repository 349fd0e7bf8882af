"""What reading, checking and writing the files of SDSS and Pan-STARRS1 costs.

    python benchmarks/fits.py           two minutes
    python benchmarks/fits.py --quick   a few seconds, small numbers

All candidates take turns in one process and one thread, and CPU time is counted, so that other
work on the machine disturbs little. fitsio takes part if it is installed.
"""
import argparse
import io
import os
import platform
import tempfile
import time
from functools import lru_cache
from pathlib import Path

import numpy as np
from astropy.io import fits

from specpred.cutouts import check_cutout, skycell_wcs
from specpred.formats import (
    SDSSSpectrum,
    check_spectrum,
    read_sdss,
    sdss_spectrum_bytes,
)

try: import fitsio
except ImportError: fitsio = None

RESULTS = Path(__file__).with_suffix(".md")
PIXELS = ("flux", "loglam", "ivar", "and_mask", "or_mask", "model")
OBJECT = ("z", "zwarning", "class", "subclass", "plug_ra", "plug_dec", "plate", "mjd", "fiberid")
SIZE = 64  # of a cutout, pixels
FILES, CUTOUTS, CORES = 7600, 8000, 2  # of the demo profile


def example_spectrum(fiberid, n=3830):
    "Noise in the layout of SDSS."
    rng = np.random.default_rng(fiberid)
    flux, mask = rng.normal(10, 1, n).astype(np.float32), np.zeros(n, np.uint32)
    return SDSSSpectrum(flux, np.ones(n, np.float32), mask, 3.58, redshift=0.1, zwarning=0,
        object_class="GALAXY", subclass="", ra=150.0, dec=2.0, plate=266, mjd=51602,
        fiberid=fiberid, or_mask=mask, model=flux)


def example_cutout():
    "A cutout around (180, 30)."
    header = skycell_wcs(180, 30, SIZE).to_header()
    header.update({"HIERARCH FPA.FILTERID": "g.00000", "EXPTIME": 860.0})
    stream = io.BytesIO()
    fits.PrimaryHDU(np.ones((SIZE, SIZE), np.float32), header).writeto(stream)
    return stream.getvalue()


def astropy_alone(path):
    "The same columns through astropy's own tables."
    with fits.open(path, memmap=False) as hdus:
        pixels, objects = hdus[1].data, hdus[2].data
        return [pixels[name] for name in PIXELS] + [objects[name][0] for name in OBJECT]


def with_fitsio(path):
    "The same columns through CFITSIO."
    with fitsio.FITS(str(path)) as hdus:
        return hdus[1].read(columns=list(PIXELS)), hdus[2].read(columns=list(OBJECT))


FORMS = dict(A="S", B="u1", I=">i2", J=">i4", K=">i8", E=">f4", D=">f8")


@lru_cache(maxsize=1024)
def parsed_by_hand(header):
    "Record type, number of rows and size of the data of a header, without any library."
    starts = range(0, len(header), 80)
    cards = {header[i:i + 8].decode().strip(): header[i + 10:i + 80].decode() for i in starts}
    def number(key): return int(cards.get(key, "0").split("/")[0])
    def text(key): return cards[key].split("'")[1].strip()
    columns = []
    for i in range(1, number("TFIELDS") + 1):
        form = text(f"TFORM{i}")
        repeat = int(form[:-1] or 1)
        columns.append((text(f"TTYPE{i}").lower(), f"S{repeat}") if form[-1] == "A"
            else (text(f"TTYPE{i}").lower(), FORMS[form[-1]], (repeat,) if repeat > 1 else ()))
    size = number("NAXIS1")*number("NAXIS2") if number("NAXIS") else 0
    return np.dtype(columns), number("NAXIS2"), size


def by_hand(path):
    "The first two tables of a file without any library: the smallest time that there can be."
    content, tables, start = path.read_bytes(), [], 0
    while len(tables) < 3:
        end = content.index(b"END" + b" "*77, start)
        record, n_rows, size = parsed_by_hand(content[start:end])
        start += -(-(end + 80 - start)//2880)*2880
        tables.append(np.frombuffer(content, record, n_rows if size else 0, start))
        start += -(-size//2880)*2880
    return [tables[1][name] for name in PIXELS] + [tables[2][name][0] for name in OBJECT]


def written_by_astropy(spectrum):
    "A file whose tables astropy writes."
    stream = io.BytesIO()
    with fits.open(io.BytesIO(sdss_spectrum_bytes(spectrum))) as hdus:
        tables = [fits.BinTableHDU(np.array(hdu.data), name=hdu.name) for hdu in hdus[1:]]
        fits.HDUList([fits.PrimaryHDU(header=hdus[0].header), *tables]).writeto(stream)
    return stream.getvalue()


def milliseconds(candidates, rounds):
    "Median CPU time of each step, taken in turn, for one of the files that it treats."
    times = {name: [] for name in candidates}
    for _ in range(rounds + 1):  # the first one warms up
        for name, (step, files) in candidates.items():
            start = time.process_time()
            for file in files: step(file)
            times[name].append((time.process_time() - start)/len(files)*1e3)
    return {name: float(np.median(values[1:])) for name, values in times.items()}


def check_first(content):
    "Checks the first of the spectra."
    check_spectrum(content, 266, 51602, 1)


def check_cutout_at(content):
    "Checks a cutout of `example_cutout`."
    check_cutout(content, "g", 180, 30, SIZE)


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="small numbers")
    n, rounds = (40, 2) if parser.parse_args().quick else (500, 5)
    load = os.getloadavg()[0]
    spectra = [example_spectrum(fiberid) for fiberid in range(1, n + 1)]
    first, cutout = sdss_spectrum_bytes(spectra[0]), example_cutout()
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder)/f"{i}.fits" for i in range(n)]
        for path, spectrum in zip(paths, spectra, strict=True):
            path.write_bytes(sdss_spectrum_bytes(spectrum))
        few = n//10  # for what takes long
        candidates = {
            "read a spectrum: by hand": (by_hand, paths),
            "read a spectrum: `read_sdss`": (read_sdss, paths),
            "read a spectrum: astropy alone": (astropy_alone, paths[:few]),
            "read a spectrum: fitsio": (with_fitsio, paths[:few]),
            "check a spectrum": (check_first, [first]*n),
            "check a cutout": (check_cutout_at, [cutout]*n),
            "write a spectrum: `sdss_spectrum_bytes`": (sdss_spectrum_bytes, spectra),
            "write a spectrum: astropy alone": (written_by_astropy, spectra[:few])}
        if fitsio is None: del candidates["read a spectrum: fitsio"]
        report(milliseconds(candidates, rounds), n, rounds, load)


def report(results, n, rounds, load):
    "Writes the table."
    lines = ["# What FITS files cost", "",
        f"Made by `fits.py`: {os.cpu_count()} cores {platform.machine()}, Python "
        f"{platform.python_version()}, one thread, median CPU time of {rounds} rounds in turn over "
        f"{n} files, load average {load:.1f} before. The last column is for the demo profile, with "
        f"{FILES:,} spectra and {CUTOUTS:,} cutouts on {CORES} cores; its stages take about 20 s "
        "(spectra), 60 s (download) and 90 s (mock survey).", "",
        "| | ms | files/s | demo, s |", "|---|---|---|---|"]
    for name, ms in results.items():
        seconds = ms/1e3*(CUTOUTS if "cutout" in name else FILES)/CORES
        lines.append(f"| {name} | {ms:.2f} | {1e3/ms:,.0f} | {seconds:.1f} |")
    RESULTS.write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__": main()
