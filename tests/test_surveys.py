"""A survey of six bands goes through the whole library: mock galaxies, download, images, training
and prediction. Nothing outside the surveys chapter knows how many bands there are."""
import ast
from pathlib import Path

import numpy as np
import pytest

import specpred
from specpred.config import ArchiveParameters, MockParameters, Paths, TrainingParameters
from specpred.download import download
from specpred.images import open_images, pack_images
from specpred.mock_survey import make_survey
from specpred.models import load
from specpred.predict import Predictor
from specpred.surveys import RUBIN
from specpred.training import make_sample, train_models

SIZE = 40


@pytest.fixture(scope="module")
def rubin(tmp_path_factory):
    "Paths of a downloaded and packed Rubin survey of 48 galaxies, and the truth."
    paths = Paths(tmp_path_factory.mktemp("rubin"))
    mock = MockParameters(n_galaxies=48, galaxies_per_side=1, stamp_size=56)
    truth = make_survey(mock, paths.mock, 1, RUBIN, n_jobs=1, progress=False)
    archives = ArchiveParameters(split=(0.4, 0.2, 0.2, 0.2))
    catalogue = download(archives, paths.raw, RUBIN, SIZE, 1, paths.mock, progress=False)
    assert catalogue.has_images.all(), catalogue.status.unique()
    pack_images(
        catalogue.specobjid, paths.raw_cutouts, paths.images, RUBIN, SIZE, n_jobs=1, progress=False
    )
    columns = ["specobjid", "mag_r", "mag_g", "petro_r50"]
    return paths, catalogue.merge(truth[columns], on="specobjid")


def test_six_bands_from_mock_to_prediction(rubin):
    paths, catalogue = rubin
    images = open_images(paths.images)
    assert images.survey == RUBIN and images.shape == (48, 6, SIZE, SIZE)
    targets = catalogue[["mag_r", "mag_g"]].set_axis(["target_1", "target_2"], axis=1)
    latents = ((targets - targets.mean())/targets.std()).join(catalogue[["specobjid", "split"]])
    parameters = TrainingParameters(models=("conv3", "deconv3"), epochs=2, batch_size=8)
    train_models(
        make_sample(images, latents),
        (np.zeros(2), np.ones(2)),
        parameters,
        0,
        paths,
        progress=False,
    )
    for name in parameters.models:
        model = load(paths.weights(name, 0))
        assert model.survey == RUBIN and model.channels == RUBIN.bands
        predicted = Predictor(model).predict(images.read(catalogue.specobjid[:5]))
        assert predicted.targets.shape == (5, 2) and predicted.flux is None


def test_pixels_are_calibrated_for_their_survey(rubin):
    paths, catalogue = rubin
    images = open_images(paths.images)
    small = catalogue.sort_values("petro_r50").head(8).set_index("specobjid")
    r = list(RUBIN.bands).index("r")
    flux = images.read(small.index)[:, r].sum((1, 2))
    expected = 10**(-0.4*(small.mag_r - 31.4))
    # the cutout is 8 arcsec wide and loses the outskirts
    assert np.median(flux/expected) == pytest.approx(0.9, abs=0.1)


def test_bands_and_scale_are_written_in_the_surveys_chapter_only():
    for path in Path(specpred.__file__).parent.glob("[!_]*.py"):
        if path.stem in ("surveys", "cutouts"): continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant): assert node.value not in ("grizy", 363.1), path
