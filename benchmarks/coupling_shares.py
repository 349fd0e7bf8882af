"""What each coupling of the mock sky brings to physical properties: boosting from noise-free
magnitudes, and from these with the true structure, with all couplings, with each one off by itself
and with none. Needs no run and takes a few minutes; `couplings.py` does the same for the targets
and for structure measured on images, from a finished run, and takes an hour."""
import argparse
from pathlib import Path

import joblib
import numpy as np
import pandas as pd
from couplings import CASES

from specpred.config import random_generator
from specpred.evaluation import climb, ladder_table, magnitude_and_colours
from specpred.mock_light import STRUCTURE, draw_light
from specpred.mock_survey import stellar_library
from specpred.surveys import PS1

QUANTITIES = ["log_ssfr", "oxygen", "stars_log_z", "mean_age", "av_stars", "redshift"]


def gains(couplings, n):
    "Gain of the true structure over the magnitudes by quantity, %, with a 95 % interval."
    galaxies = draw_light(stellar_library(), n, 1, "coupling shares", couplings=couplings).galaxies
    magnitudes = galaxies[[f"mag_{band}" for band in PS1.bands]].to_numpy()
    seen = galaxies[[*STRUCTURE, "petro_r50"]]
    rungs = {"magnitudes": pd.DataFrame(magnitude_and_colours(magnitudes)), "structure": seen}
    quantities, n_test = galaxies[QUANTITIES], n//4
    predictions = climb(rungs, quantities, n_test, 300, 0, n_jobs=1, progress=False)
    ladder = ladder_table(predictions, quantities[-n_test:], random_generator(2, couplings))
    rows = ladder[ladder.rung == "structure"].set_index("quantity")
    return 100*rows[["gain", "gain_lower", "gain_upper"]].loc[QUANTITIES]


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--galaxies", type=int, default=3000, help="a quarter of them to test")
    n = parser.parse_args().galaxies
    tables = joblib.Parallel(2)(joblib.delayed(gains)(case, n) for case in CASES)
    lines = ["# What the couplings bring to physical properties\n",
        "Made by `coupling_shares.py`.\n",
        f"{n} galaxies a row, a quarter of them to test. By how many per cent the true structure "
        "and the size lower the error that noise-free magnitudes leave, with the interval that "
        "holds 95 % of the bootstrap's draws. A minus: without this coupling (07_relations).\n",
        "| couplings | " + " | ".join(QUANTITIES) + " |", "|---|" + "---|"*len(QUANTITIES)]
    for case, table in zip(CASES, tables, strict=True):
        cells = [f"{g:.0f} ({a:.0f} to {b:.0f})" for g, a, b in np.asarray(table)]
        lines.append(f"| {case} | " + " | ".join(cells) + " |")
    Path(__file__).with_suffix(".md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__": main()
