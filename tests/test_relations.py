"""Drawn galaxies follow the published relations, and each coupling can be switched off.

Everything is measured on parameters as they are drawn, before a survey selects. Fits hold the other
drivers of a property. Where values are clipped, only galaxies whose expected value is at least 2.5
sigma away from the limit are used, so that slopes change by less than 2 per cent."""
import functools
from typing import NamedTuple

import numpy as np
import pandas as pd
import pytest
from scipy import optimize

from specpred.config import InvalidInputError
from specpred.mock_galaxies import COSMOLOGY, draw_parameters
from specpred.relations import (COUPLINGS, half_light_radius, ionization, load_relations,
    oxygen_abundance, parse_couplings, passive_fraction, photoionization_scale, relation,
    stellar_metallicity, velocity_dispersion)

N = 20_000


@functools.cache
def drawn(couplings="all"):
    "Galaxies, with some drivers that are no columns."
    table = draw_parameters(N, np.random.default_rng(20), couplings)
    return table.assign(passive=table.kind == "quiescent", disturbed=table.tidal_tail > 0,
        log_ew=11.4 + table.log_ssfr + table.log_burst,
        tilt=np.log10(table.axis_ratio.clip(0.15))**2,
        red=1/(1 + np.exp((table.delta_ms + 0.5)/0.15)),
        arcsec=60*table.radius/COSMOLOGY.kpc_proper_per_arcmin(table.redshift).value)


class Fit(NamedTuple):
    "Coefficients of the drivers, their errors, and the scatter."
    slopes: np.ndarray
    errors: np.ndarray
    scatter: float | None  # None: the relation has none
    n: int


def linear(y, *drivers):
    design = np.column_stack([np.ones(len(y)), *drivers]).astype(float)
    y = np.asarray(y, float)
    coefficients = np.linalg.lstsq(design, y, rcond=None)[0]
    scatter = (y - design @ coefficients).std(ddof=design.shape[1])
    errors = scatter*np.sqrt(np.diag(np.linalg.inv(design.T @ design)))
    return Fit(coefficients[1:], errors[1:], scatter, len(y))


def mean(y):
    return Fit(np.array([np.mean(y)]), np.array([np.std(y)/np.sqrt(len(y))]), np.std(y), len(y))


def no_scatter(fit):
    return fit._replace(scatter=None)


def forming(g):
    return g[g.kind == "star-forming"]


# Measurements. Each returns a fit whose first slope is that of the relation.

def main_sequence(g):
    return linear(forming(g).log_sfr, forming(g).log_mass)


def ages(g, size_first=False):
    g = forming(g)
    expected = 0.66 + 0.10*(g.log_mass - 10.5) - 0.5*g.log_size
    g = g[expected.between(np.log10(1.5) + 0.3, np.log10(9) - 0.3)]
    drivers = [g.log_mass, g.log_size]
    return linear(np.log10(g.old_age), *drivers[::-1 if size_first else 1])


def stellar_z(g, first=0):
    drivers = [stellar_metallicity(g.log_mass), g.passive, g.log_size,
        passive_fraction(g.log_mass - 0.35)]
    return linear(g.stars_log_z, drivers.pop(first), *drivers)


def gas_z(g, first):
    "Curti et al.'s formula with free coefficients: gamma, of the rate, and of the size."
    def formula(known, gamma, of_size, zero, mass, of_rate):
        log_mass, size, rate = known
        above = log_mass + of_size*size - mass - of_rate*rate
        return zero - gamma/2.1*np.log10(1 + 10**(-2.1*above))
    g = forming(g)
    g = g[g.delta_ms.abs() < 1]
    known = g.log_mass, g.log_size, g.log_sfr
    values, covariance = optimize.curve_fit(formula, known, g.oxygen, [0.3, -0.5, 8.7, 10, 0.5])
    order = [first, *np.delete(np.arange(5), first)]
    scatter = (g.oxygen - formula(known, *values)).std()
    return Fit(values[order], np.sqrt(np.diag(covariance))[order], scatter, len(g))


def gas_gradient(g):
    g = g[g.log_mass.between(9, 10.5)]
    return linear(g.gas_gradient, g.log_mass - 9)


def dust(g):
    g = forming(g)
    g = g[g.log_mass > 10]
    x = g.log_mass - 10
    return linear(0.82*g.av_lines - 0.11*x**2 + 0.09*x**3, x, g.tilt)


def inclination(g, column="av_stars"):
    g = forming(g)
    g = g[g.log_mass.between(10.3, 10.8)]
    return no_scatter(linear(g[column]/1.2, g.tilt, g.log_mass))


def rotation(g):
    g = g[~g.passive & (g.axis_ratio < 0.95)]
    turned = np.sqrt(g.sigma_gas**2 - 30**2)/np.sqrt(1 - g.axis_ratio**2)/0.4
    return linear(np.log10(turned), g.log_mass)


def logit(p):
    return np.log(p/(1 - p))


def quenching(g):
    "Maximum likelihood of a logistic curve; 0.9 of those that are not quenched are active."
    x, passive = g.log_mass + np.log10(g.bulge_to_total) - 10.2, g.passive
    def minus_log_likelihood(p):
        active = 0.9/(1 + np.exp(p[0]*x + p[1]))
        return -np.where(passive, np.log(1 - active), np.log(active)).sum()
    best = optimize.minimize(minus_log_likelihood, [3.0, 0.0]).x
    step = 0.05
    shifts = step*np.array([(1, 0), (-1, 0), (0, 1), (0, -1), (1, 1), (-1, -1)])
    a, b, c, d, e, f = (minus_log_likelihood(best + shift) for shift in shifts)
    here = minus_log_likelihood(best)
    mixed = (e + f - a - b - c - d + 2*here)/2
    curvature = np.array([[a + b - 2*here, mixed], [mixed, c + d - 2*here]])/step**2
    return Fit(best, np.sqrt(np.diag(np.linalg.inv(curvature))), None, len(g))


def mass_size(g):
    return linear(np.log10(g.radius), np.log10(half_light_radius(g.log_mass, g.passive)))


def arms(g):
    g = g[g.delta_ms.between(-1.5, 0.3)]
    return linear(np.log10(g.arm_amplitude), g.delta_ms)


def clumps(g):
    g = g[g.log_ew > 1.4]
    return linear(g.clumpiness, g.log_ew)


def asymmetry(g):
    g = g[~g.disturbed & (g.clumpiness > 0.2)]  # less is clipped at an asymmetry of 0.01
    return linear(g.lopsidedness/1.3, g.clumpiness)


def mergers(g):
    likely = g.kind.isin(("starburst", "post-starburst"))
    fit = mean(g.disturbed[likely])
    return no_scatter(fit)


def bars(g):
    return no_scatter(linear(g.bar_share > 0, g.red))


def dispersion(g):
    g = g[pd.Series(velocity_dispersion(g.log_mass, g.radius)).between(75, 260)]
    return linear(np.log10(g.sigma_stars), g.log_mass - np.log10(g.radius))


RELATIONS = dict(main_sequence=main_sequence,
    burstiness=lambda g: linear(forming(g).log_burst, forming(g).log_mass),
    old_age=ages, stellar_age_size=lambda g: no_scatter(ages(g, size_first=True)),
    stellar_metallicity=stellar_z, stellar_types=lambda g: no_scatter(stellar_z(g, 1)),
    stellar_metallicity_size=lambda g: no_scatter(stellar_z(g, 2)),
    stellar_gradient=lambda g: mean(g.stars_gradient),
    gas_metallicity=lambda g: gas_z(g, 0),
    gas_metallicity_size=lambda g: no_scatter(gas_z(g, 1)), gas_gradient=gas_gradient,
    dust=dust, inclination=inclination,
    inclination_lines=lambda g: inclination(g, "av_lines"), rotation=rotation,
    bulge=lambda g: linear(logit(g.bulge_to_total), g.log_mass), quenching=quenching,
    mass_size=mass_size, arms=arms, clumps=clumps, asymmetry=asymmetry, mergers=mergers, bars=bars,
    dispersion=dispersion)


def test_every_relation_is_measured():
    assert set(RELATIONS) | {"ionization"} == set(load_relations().index)


@pytest.mark.parametrize("name", RELATIONS)
def test_slope_and_scatter(name):
    published, fit = relation(name), RELATIONS[name](drawn())
    assert fit.slopes[0] == pytest.approx(published.slope, abs=4*fit.errors[0])
    if fit.scatter is not None:
        error = fit.scatter/np.sqrt(2*fit.n)
        clipped = 0.02*published.scatter
        assert fit.scatter == pytest.approx(published.scatter, abs=4*error + clipped)


def test_gas_follows_the_rate_as_published():
    fit = gas_z(drawn(), 0)
    _, _, zero, mass, of_rate = fit.slopes
    assert [zero, mass, of_rate] == pytest.approx([8.779, 10.11, 0.56], abs=4*fit.errors[2:].max())


def test_ionization():
    deviate = drawn().log_u_deviate
    published, n = relation("ionization"), len(deviate)
    assert deviate.mean() == pytest.approx(0, abs=4*published.scatter/np.sqrt(n))
    assert deviate.std() == pytest.approx(published.scatter, abs=4*published.scatter/np.sqrt(2*n))
    # where the density of electrons does not change, here at its least, the slope is all there is
    low, high = ionization(9.0, np.array([-3.0, -2.0]), 8.5)
    assert high - low == pytest.approx(published.slope)


def test_types_do_not_move_the_mean_metallicity():
    galaxies = drawn()
    off = galaxies.stars_log_z - stellar_metallicity(galaxies.log_mass)
    for _, some in off.groupby(pd.cut(galaxies.log_mass, np.arange(9, 11.6, 0.25))):
        assert some.mean() == pytest.approx(0, abs=4*some.std()/np.sqrt(len(some)) + 0.01)


def test_others_are_seldom_disturbed():
    galaxies = drawn()
    others = galaxies[~galaxies.kind.isin(("starburst", "post-starburst"))]
    assert others.disturbed.mean() == pytest.approx(0.02, abs=4*np.sqrt(0.02/len(others)))


def test_metals_of_gas_have_the_published_limits():
    assert oxygen_abundance(13, 0) == pytest.approx(8.779, abs=1e-3)
    steep = oxygen_abundance(np.array([7.0, 8.0]), -1)
    assert np.diff(steep) == pytest.approx(relation("gas_metallicity").slope, abs=0.01)
    assert photoionization_scale(np.linspace(7, 9, 50)).max() == pytest.approx(9.11)


# What each coupling ties: slopes of a hidden property, over what an image shows, that vanish

def no_slope(name):
    return lambda g: RELATIONS[name](g)


def bulges_of_passive(g):
    deviate = logit(g.bulge_to_total) - relation("bulge").slope*g.log_mass
    return linear(g.passive, deviate, g.log_mass, g.log_mass**2)


def disturbed_starbursts(g):
    return linear(g.disturbed, g.kind.isin(("starburst", "post-starburst")))


def gas_in_tilted_disks(g):
    g = g[~g.passive & g.log_mass.between(10, 10.8)]
    return linear(np.log10(g.sigma_gas), g.axis_ratio, g.log_mass)


def stars_and_size(g):
    return linear(np.log10(g.sigma_stars), g.log_size, g.log_mass, g.passive)


TIES = dict(quenching=[bulges_of_passive],
    mass_size=[lambda g: linear(np.log10(g.half_light_radius), np.log10(g.arcsec))],
    arms=[arms], clumps=[clumps], asymmetry=[asymmetry], mergers=[disturbed_starbursts],
    bars=[bars],
    gas_metallicity_size=[no_slope("gas_metallicity_size")],
    stellar_metallicity_size=[no_slope("stellar_metallicity_size")],
    stellar_age_size=[no_slope("stellar_age_size")],
    inclination=[inclination, no_slope("inclination_lines")],
    dispersion=[stars_and_size, gas_in_tilted_disks],
    populations=[lambda g: linear(g.bulge_seen, g.bulge_to_total)])

# columns that may change when a coupling is off
CHANGES = {name: set(columns.split()) for name, columns in dict(
    quenching="""kind delta_ms log_sfr log_ssfr log_burst old_age bulge_age old_duration
        young_stop young_start
        young_fraction oxygen stars_log_z av_stars av_lines nucleus nucleus_ew broad_share
        old_stars_ew radius
        half_light_radius bulge_radius disk_scale arm_amplitude bar_share clumpiness clump_share
        lopsidedness tidal_tail sigma_stars sigma_gas""",
    mass_size="half_light_radius bulge_radius disk_scale", arms="arm_amplitude",
    clumps="clumpiness clump_share lopsidedness", asymmetry="lopsidedness",
    mergers="lopsidedness tidal_tail",
    bars="bar_share", gas_metallicity_size="oxygen", stellar_metallicity_size="stars_log_z",
    stellar_age_size="old_age bulge_age", inclination="av_stars av_lines",
    dispersion="sigma_stars sigma_gas", populations="""bulge_seen bulge_radius disk_scale
        bulge_sersic populations_apart""").items()}


def test_every_coupling_is_tested():
    assert set(TIES) == set(CHANGES) == set(COUPLINGS)


@pytest.mark.parametrize("coupling", COUPLINGS)
def test_a_coupling_that_is_off_ties_nothing(coupling):
    for measure in TIES[coupling]:
        on, off = measure(drawn()), measure(drawn(f"-{coupling}"))
        assert abs(on.slopes[0]) > 6*on.errors[0], "nothing to switch off"
        assert off.slopes[0] == pytest.approx(0, abs=4*off.errors[0])


@pytest.mark.parametrize("coupling", COUPLINGS)
def test_a_coupling_leaves_other_columns(coupling):
    on, off = (draw_parameters(5000, np.random.default_rng(3), c) for c in ("all", f"-{coupling}"))
    assert {name for name in on if not on[name].equals(off[name])} == CHANGES[coupling]


@pytest.mark.parametrize("coupling, column", [("mass_size", "half_light_radius"),
    ("populations", "bulge_seen")])
def test_a_coupling_that_is_off_keeps_the_spread(coupling, column):
    on, off = (drawn(c)[column].to_numpy() for c in ("all", f"-{coupling}"))
    quantiles = np.linspace(0.05, 0.95, 10)
    assert np.quantile(off, quantiles) == pytest.approx(np.quantile(on, quantiles), rel=0.05)


@pytest.mark.parametrize("text, names", [("all", set(COUPLINGS)), ("none", set()),
    ("arms", {"arms"}), (" arms , bars ", {"arms", "bars"}),
    ("-arms, -bars", set(COUPLINGS) - {"arms", "bars"})])
def test_couplings_are_understood(text, names):
    assert parse_couplings(text) == names


@pytest.mark.parametrize("text, message", [("", "'' is none of"), ("arms,", "'' is none of"),
    ("Arms", "'Arms' is none of"), ("arms;bars", "'arms;bars' is none of"),
    ("all,arms", "'all' is none of"), ("-none", "'none' is none of"),
    ("arms,-bars", "not both"), ("legs,wings", "'legs', 'wings' is none of")])
def test_wrong_couplings_are_named(text, message):
    with pytest.raises(InvalidInputError, match=message): parse_couplings(text)
    with pytest.raises(InvalidInputError, match=message):
        draw_parameters(3, np.random.default_rng(1), text)
