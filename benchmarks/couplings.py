"""What each coupling of the mock sky brings to the information ladder: the ladder with all of them,
with each one off by itself and with none, on the autoencoder of a finished run.

    specpred reproduce --profile demo
    python benchmarks/couplings.py --profile demo

takes about two minutes a ladder of 7,000 galaxies on two cores. Each is kept below the run's
folder, so that a later call goes on with those that are missing; --only makes one of them."""
import argparse
from pathlib import Path

import pandas as pd
from interleaved import write

from specpred.config import get_paths, get_profile, random_generator, replace
from specpred.eigenspectra import load_store
from specpred.evaluation import (
    LADDER_QUANTITIES,
    climb,
    ladder_quantities,
    ladder_rungs,
    ladder_table,
    make_ladder_sample,
)
from specpred.relations import COUPLINGS
from specpred.stages import atomic_path
from specpred.surveys import find_survey
from specpred.vae import SpectrumModel

RESULTS = Path(__file__).with_suffix(".md")
TITLE = """# What the couplings of the mock sky bring

Made by `couplings.py`.
"""
# rungs whose gain is reported, by the title of a table
GAINS = {
    "Measured structure over magnitudes": "measured structure",
    "True structure over magnitudes": "true structure",
}
CASES = ("all", "none", *(f"-{name}" for name in COUPLINGS))  # as `mock.couplings`


def merged(rungs):
    "Only the rungs that are reported, each with all columns that it adds to the one before."
    parts, added = {}, []
    for name, columns in rungs.items():
        added.append(columns)
        if name == "magnitudes" or name in GAINS.values():
            parts[name], added = pd.concat(added, axis=1), []
    return parts


def make_ladder(couplings, profile, paths, n):
    "`ladder_table` of a mock sky with these couplings."
    mock = replace(profile.mock, couplings=couplings)
    survey = find_survey(profile.images.survey)
    sample = make_ladder_sample(
        n, mock, survey, profile.images.size, profile.spectra, profile.seed
    )
    store, model = load_store(paths.spectra), SpectrumModel.load(paths.vae)
    quantities = ladder_quantities(sample, store, model, profile.spectra)
    rungs, n_test = merged(ladder_rungs(sample, survey.bands)), n//7
    predictions = climb(
        rungs, quantities, n_test, profile.evaluation.boosting_iterations, profile.seed
    )
    rng = random_generator(profile.seed, "ladder table")
    return ladder_table(predictions, quantities[-n_test:], rng)


def gains_of(ladder, rung):
    "By quantity: gain, lower and upper end, %, of a rung over the magnitudes."
    rows = ladder[ladder.rung == rung].set_index("quantity")
    return 100*rows[["gain", "gain_lower", "gain_upper"]]


def gain_rows(ladders, rung):
    "Rows of a table: gain of a rung in each case, with interval, and share that a coupling brings."
    gains = {case: gains_of(ladder, rung) for case, ladder in ladders.items()}
    yield "| couplings | " + " | ".join(LADDER_QUANTITIES) + " |"
    yield "|---|" + "---|"*len(LADDER_QUANTITIES)
    for case, table in gains.items():
        cells = []
        for quantity in LADDER_QUANTITIES:
            if quantity not in table.index:
                cells.append("")
                continue
            gain, lower, upper = table.loc[quantity]
            cells.append(f"{gain:.1f} ({lower:.1f} to {upper:.1f})")
            whole = gains["all"].gain.get(quantity, 0)
            if case != "all" and whole > 0: cells[-1] += f", {1 - gain/whole:.0%}"
        yield f"| {case} | " + " | ".join(cells) + " |"


def report(ladders, n, profile):
    "Writes the tables of all ladders that there are."
    lines = [f"Profile {profile.name}, {n} galaxies a ladder, a seventh of them to test. A minus: "
        "without this coupling; 07_relations says what they are. In % of the error from "
        "magnitudes: the gain, in brackets the interval that holds 95 % of the bootstrap's draws, "
        "then the share of the gain with all couplings that is lost."]
    for title, rung in GAINS.items():
        lines += ["", f"### {title}", "", *gain_rows(ladders, rung)]
    errors = {case: ladder[ladder.rung == "magnitudes"].set_index("quantity").error
        for case, ladder in ladders.items()}
    table = pd.DataFrame(errors).T.round(3)
    lines += ["", "### Error of the magnitudes alone, over the scatter", "",
        "| couplings | " + " | ".join(table) + " |", "|---|" + "---|"*table.shape[1]]
    lines += [f"| {case} | " + " | ".join(map(str, row)) + " |"
        for case, row in zip(table.index, table.to_numpy(), strict=True)]
    write("The ladder without couplings", lines, RESULTS, TITLE)


def main():
    parser = argparse.ArgumentParser(description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--profile", default="demo")
    parser.add_argument("--data-dir", type=Path, help="folder that holds <profile>/")
    parser.add_argument("--galaxies", type=int, help="of a ladder; as in the profile")
    parser.add_argument("--only", choices=CASES, metavar="COUPLINGS",
        help=f"make this ladder only: all, none, or one of --only=-{', --only=-'.join(COUPLINGS)}")
    chosen = parser.parse_args()
    profile, paths = get_profile(chosen.profile), get_paths(chosen.profile, chosen.data_dir)
    n = chosen.galaxies or profile.evaluation.ladder_galaxies
    ladders = {}
    for case in CASES:
        path = paths.root/"couplings"/f"{case}-{n}.csv"
        if not path.exists():
            if chosen.only not in (None, case): continue
            print(case, flush=True)
            with atomic_path(path) as part:
                make_ladder(case, profile, paths, n).to_csv(part, index=False)
        ladders[case] = pd.read_csv(path)
    if "all" in ladders: report(ladders, n, profile)


if __name__ == "__main__": main()
