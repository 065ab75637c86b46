"""The closed-form head: by hand, against other derivations, by law, and with liars among the clients."""

from __future__ import annotations

import math

import numpy as np
import pytest
from data_helper import statistics_of
from hypothesis import given, settings
from hypothesis import strategies as st

from fedara_flwr.merging.statistics import FAR, RIDGE, Merged, believable, merge, shrunk, solve, temperature
from fedara_flwr.model.statistics import Statistics, from_upper, upper

laws = settings(deadline=None, max_examples=80)


def apart(found, expected):
    """Largest difference over the largest number expected."""
    return np.abs(found - expected).max() / max(np.abs(expected).max(), 1e-300)


def close(one: Merged, other: Merged, size, tolerance=1e-9):
    """Equal but for rounding, `size` being the largest feature: a covariance is a difference of squares of that."""
    return (
        np.array_equal(one.counts, other.counts)
        and one.freedom == other.freedom
        and np.abs(one.means - other.means).max() <= tolerance * size
        and np.abs(one.covariance - other.covariance).max() <= tolerance * size**2
    )


def same_bits(one: Merged, other: Merged):
    return all(np.array_equal(getattr(one, name), getattr(other, name)) for name in vars(one))


def told(features, classes, count, clients, scatter=True):
    """Each client's statistics, `clients` being the number of each row's."""
    return {
        str(key): statistics_of(features[clients == key], classes[clients == key], count, scatter)
        for key in np.unique(clients).tolist()
    }


def predicted(weights, biases, features):
    return (features @ weights.T + biases).argmax(axis=1)


# -- by hand --------------------------------------------------------------------------------------------------------
FLAT = np.array([[0.0], [2.0], [4.0], [6.0], [8.0]]), np.array([0, 0, 1, 1, 1])
PLANE = np.array([[0.0, 0.0], [2.0, 0.0], [0.0, 4.0], [4.0, 4.0], [2.0, 4.0]]), np.array([0, 0, 1, 1, 1])


def test_two_classes_on_a_line():
    """Means 1 and 6, scatter 1 + 1 + 4 + 0 + 4 = 10 over 5 - 2; one number is its own mean variance, whatever is shrunk."""
    merged = merge({"0": statistics_of(*FLAT, 2)})
    assert merged.counts.tolist() == [2, 3] and merged.means.ravel().tolist() == [1, 6] and merged.freedom == 3
    assert merged.covariance == pytest.approx(10 / 3)
    weights, biases, _ = solve(merged, bias=True)
    # the centre is 4: (1 - 4)·0.3 and (6 - 4)·0.3; log prior - half of (m - 4)·0.3·(m + 4)
    np.testing.assert_allclose(weights.ravel(), [-0.9, 0.6])
    np.testing.assert_allclose(biases, [math.log(0.4) + 0.5 * 0.9 * 5, math.log(0.6) - 0.5 * 0.6 * 10])
    # where two normals of equal variance meet: the middle, moved by variance·ln(2/3) over the distance
    border = (biases[1] - biases[0]) / (weights[0, 0] - weights[1, 0])
    assert border == pytest.approx(3.5 + (10 / 3) * math.log(2 / 3) / 5)


def test_a_plane_and_its_share_of_shrinkage():
    """Scatter diag(2 + 8, 0) over 3: S = diag(10/3, 0), tr S² = tr² S = 100/9; share = tr² S/((3 + 1 - 1)·tr² S/2)."""
    merged = merge({"0": statistics_of(*PLANE, 2)})
    np.testing.assert_allclose(merged.means, [[1, 0], [2, 4]])
    np.testing.assert_allclose(merged.covariance, np.diag([10 / 3, 0]), atol=1e-15)
    covariance, share = shrunk(merged.covariance, merged.freedom)
    assert share == pytest.approx(2 / 3)
    np.testing.assert_allclose(covariance, np.diag([10 / 9 + 10 / 9, 10 / 9]), atol=1e-15)
    weights, biases, said = solve(merged, bias=True)
    assert said == share
    # the centre is (1.6, 2.4)
    np.testing.assert_allclose(weights, [[-0.6 * 0.45, -2.4 * 0.9], [0.4 * 0.45, 1.6 * 0.9]])
    np.testing.assert_allclose(
        biases,
        [
            math.log(0.4) - 0.5 * (-0.27 * 2.6 - 2.16 * 2.4),
            math.log(0.6) - 0.5 * (0.18 * 3.6 + 1.44 * 6.4),
        ],
    )


@pytest.mark.parametrize("width", [2, 3, 17])
def test_the_share_is_chens(width):
    rng = np.random.default_rng(width)
    for rows in (1, 5, 50, 5000):
        sample = rng.normal(size=(rows, width)) * np.linspace(1, 3, width)
        S = sample.T @ sample / rows
        tr, tr2 = np.trace(S), np.trace(S @ S)
        expected = min(1, ((1 - 2 / width) * tr2 + tr**2) / ((rows + 1 - 2 / width) * (tr2 - tr**2 / width)))
        found, share = shrunk(S, rows)
        assert share == pytest.approx(expected)
        np.testing.assert_allclose(found, (1 - expected) * S + expected * tr / width * np.eye(width), atol=1e-12)


def test_the_head_is_the_posterior_of_the_shrunk_normals():
    """Softmax of the logits = prior times density, normalised: nothing is lost by the centre that is taken off."""
    rng = np.random.default_rng(0)
    classes = np.arange(90) % 4 % 3  # priors 1/2, 1/4, 1/4
    features = rng.normal(size=(90, 5)) @ rng.normal(size=(5, 5)) + 3 * rng.normal(size=(3, 5))[classes] + 10
    merged = merge({"0": statistics_of(features, classes, 3)})
    weights, biases, _ = solve(merged, bias=True)
    precision, prior = np.linalg.inv(shrunk(merged.covariance, merged.freedom)[0]), merged.counts / 90
    distances = np.array([[(x - m) @ precision @ (x - m) for m in merged.means] for x in features])
    joint = prior * np.exp(-0.5 * distances)
    logits = features @ weights.T + biases
    odds = np.exp(logits - logits.max(axis=1, keepdims=True))
    expected = joint / joint.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(odds / odds.sum(axis=1, keepdims=True), expected, atol=1e-9)
    # and the scale of log-probabilities: their cross-entropy is smallest near the factor 1
    assert temperature(logits, classes, bias=True) > 0.5


def test_without_bias_it_is_ridge_regression_to_indicators():
    """Of shrunk second moments: near plain least squares without intercept where there are many rows, and less than it."""
    rng = np.random.default_rng(0)
    features, classes = rng.normal(size=(200, 4)) + 1, np.arange(200) % 3
    one = statistics_of(features, classes, 3)
    merged = merge({"0": one})
    covariance, share = shrunk(merged.covariance, merged.freedom)
    weights, biases, said = solve(merged, bias=False)
    assert said == share and not biases.any()
    second = covariance + sum(one.counts[c] / 200 * np.outer(one.means[c], one.means[c]) for c in range(3))
    second += RIDGE * np.trace(second) / 4 * np.eye(4)
    np.testing.assert_allclose(weights @ second, np.eye(3)[classes].T @ features / 200, atol=1e-12)
    plain = np.linalg.lstsq(features, np.eye(3)[classes], rcond=None)[0].T
    assert apart(weights, plain) < 0.2 and np.linalg.norm(weights) < np.linalg.norm(plain)


# -- who holds which row does not matter ----------------------------------------------------------------------------
@st.composite
def dealt(draw):
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    rows, width, count, clients = (draw(st.integers(low, high)) for low, high in ((1, 40), (1, 6), (1, 5), (1, 7)))
    scale, shift = draw(st.sampled_from([1e-3, 1.0, 1e3])), draw(st.sampled_from([0.0, 1.0, 30.0]))
    features = (rng.normal(size=(rows, width)) + shift) * scale
    return features, rng.integers(0, count, rows), count, rng.integers(0, clients, rows), rng


@laws
@given(dealt())
def test_any_split_of_the_rows_gives_what_all_of_them_give(case):
    features, classes, count, clients, rng = case
    whole = merge({"all": statistics_of(features, classes, count)})
    parts = told(features, classes, count, clients)
    found = merge(parts)
    assert found.counts.tolist() == np.bincount(classes, minlength=count).tolist()
    assert close(found, whole, np.abs(features).max())
    order = rng.permutation(list(parts)).tolist()
    assert same_bits(merge({key: parts[key] for key in order}), found)
    robust = merge(parts, FAR)
    assert same_bits(merge({key: parts[key] for key in order}, FAR), robust)
    assert close(merge(parts, 1e9), found, np.abs(features).max())


@laws
@given(dealt())
def test_the_whole_is_the_textbooks_pooled_covariance(case):
    features, classes, count, *_ = case
    merged = merge({"all": statistics_of(features, classes, count)})
    seen = np.unique(classes)
    freedom = len(classes) - len(seen)
    assert merged.freedom == freedom
    expected = np.zeros((features.shape[1],) * 2)
    for label in seen:
        rows = features[classes == label]
        np.testing.assert_allclose(merged.means[label], rows.mean(axis=0), rtol=1e-9, atol=1e-12 * np.abs(features).max())
        if freedom:
            expected += (rows - rows.mean(axis=0)).T @ (rows - rows.mean(axis=0)) / freedom
    np.testing.assert_allclose(merged.covariance, expected, atol=1e-9 * (features**2).max())


def test_keys_are_sorted_as_numbers_are():
    """ "10" after "9": the order of the sums is that of every other file of a run."""
    rng = np.random.default_rng(0)
    features, classes = rng.normal(size=(400, 8)) * 100, rng.integers(0, 3, 400)
    parts = told(features, classes, 3, np.arange(400) % 12)
    expected = merge({f"{int(key):02d}": one for key, one in parts.items()})
    assert same_bits(merge(dict(reversed(parts.items()))), expected)


# -- little is told -------------------------------------------------------------------------------------------------
def test_means_alone_estimate_the_covariance():
    """FedCOF: the means of 400 clients, 5 rows each, differ as the rows do, over their number."""
    rng = np.random.default_rng(0)
    mix = rng.normal(size=(4, 4))
    true, centres = mix @ mix.T, 5 * rng.normal(size=(2, 4))
    classes, clients = np.arange(4000) % 2, np.arange(4000) // 10
    features = rng.normal(size=(4000, 4)) @ mix.T + centres[classes]
    merged = merge(told(features, classes, 2, clients, scatter=False))
    assert merged.freedom == 400 * 2 - 2
    assert apart(merged.covariance, true) < 0.15  # 798 degrees of freedom: an error of √(2/798) = 5% a number
    exact = merge(told(features, classes, 2, clients))
    assert exact.freedom == 3998 and apart(exact.covariance, true) < 0.08
    np.testing.assert_allclose(merged.means, exact.means)
    expected = np.zeros((4, 4))
    for one in told(features, classes, 2, clients, scatter=False).values():
        for label in range(2):
            off = one.means[label] - merged.means[label]
            expected += one.counts[label] * np.outer(off, off)
    np.testing.assert_allclose(merged.covariance, expected / 798)


def test_some_tell_their_scatter_and_some_do_not():
    rng = np.random.default_rng(0)
    features, classes, clients = rng.normal(size=(60, 3)), np.arange(60) % 2, np.arange(60) // 20
    parts = told(features, classes, 2, clients)
    parts["2"] = told(features, classes, 2, clients, scatter=False)["2"]
    merged = merge(parts)
    assert merged.freedom == (20 - 2) * 2 + (3 - 1) * 2  # two scatters; three means of each class
    assert np.linalg.eigvalsh(merged.covariance).min() > 0


def test_one_client_that_tells_means_alone_gives_the_identity():
    one = statistics_of(*PLANE, 2, scatter=False)
    merged = merge({"0": one})
    assert merged.freedom == 0 and not merged.covariance.any()
    assert solve(merged, bias=True)[2] == 1.0
    np.testing.assert_allclose(solve(merged, bias=True)[0], one.means - [1.6, 2.4])


@pytest.mark.parametrize("far", [0.0, FAR])
@pytest.mark.parametrize("bias", [False, True])
def test_a_single_row(far, bias):
    merged = merge({"0": statistics_of(np.array([[3.0, 4.0]]), np.array([1]), 3)}, far)
    assert merged.freedom == 0 and merged.counts.tolist() == [0, 1, 0]
    np.testing.assert_array_equal(shrunk(merged.covariance, merged.freedom)[0], np.eye(2))
    weights, biases, share = solve(merged, bias)
    assert share == 1.0 and np.isfinite(weights).all() and np.isfinite(biases).all()
    if bias:
        assert not weights[[0, 2]].any()
        assert predicted(weights, biases, np.array([[3.0, 4.0]])).tolist() == [1]
    else:  # there is one class's weight, and the others have the mean of it
        np.testing.assert_array_equal(weights[[0, 2]], weights[[1, 1]])


@pytest.mark.parametrize("far", [0.0, FAR])
def test_classes_with_one_row_each_are_the_nearest_mean(far):
    means = np.array([[0.0, 0.0], [4.0, 0.0], [0.0, 9.0]])
    merged = merge({str(i): statistics_of(means[[i]], np.array([i]), 3) for i in range(3)}, far)
    weights, biases, share = solve(merged, bias=True)
    assert merged.freedom == 0 and share == 1.0
    rows = np.random.default_rng(0).normal(size=(200, 2)) * 10
    nearest = ((rows[:, None] - means) ** 2).sum(axis=2).argmin(axis=1)
    assert (predicted(weights, biases, rows) == nearest).all()


def test_rows_that_are_all_equal_leave_the_identity():
    merged = merge({"0": statistics_of(np.ones((6, 3)), np.array([0, 0, 0, 1, 1, 1]), 2)})
    assert merged.freedom == 4 and solve(merged, bias=True)[2] == 1.0


def test_no_row_at_all_makes_no_number_that_is_not_finite():
    with np.errstate(all="raise"):
        one = statistics_of(np.zeros((0, 2)), np.zeros(0, np.int64), 3)
    assert one.rows == 0 and one.freedom == 0 and not one.means.any()
    assert close(merge({"0": statistics_of(*PLANE, 3), "1": one}), merge({"0": statistics_of(*PLANE, 3)}), 4.0)


@pytest.mark.parametrize("bias", [False, True])
def test_an_unseen_class_has_no_weight_and_is_not_predicted(bias):
    rng = np.random.default_rng(0)
    classes = np.array([0, 2, 3])[np.arange(90) % 3]
    features = rng.normal(size=(90, 3)) + 4 * rng.normal(size=(4, 3))[classes] + 2
    weights, biases, _ = solve(merge({"0": statistics_of(features, classes, 4)}), bias)
    unseen = np.zeros(3) if bias else weights[[0, 2, 3]].mean(axis=0)
    np.testing.assert_array_equal(weights[1], unseen)
    assert 1 not in predicted(weights, biases, features)
    assert 1 not in predicted(weights, biases, 1e3 * rng.normal(size=(2000, 3)))
    if bias:  # Σ prior·w = 0, so wherever a row lies, some class that was seen is above its own bias
        assert biases[1] == np.delete(biases, 1).min() - 1


@pytest.mark.parametrize("bias", [True, False])
def test_an_unseen_class_is_not_predicted_on_rows_that_were_not_seen(bias):
    rng = np.random.default_rng(0)
    centres, classes = rng.normal(size=(4, 16)), np.array([0, 2, 3])[np.arange(90) % 3]
    weights, biases, _ = solve(merge({"0": statistics_of(rng.normal(size=(90, 16)) + centres[classes], classes, 4)}), bias)
    fresh = np.array([0, 2, 3])[np.arange(900) % 3]
    assert (predicted(weights, biases, rng.normal(size=(900, 16)) + centres[fresh]) != 1).all()


@laws
@given(dealt())
def test_whatever_the_rows_the_head_is_finite(case):
    features, classes, count, clients, _ = case
    for far in (0.0, FAR):
        merged = merge(told(features, classes, count, clients), far)
        if not merged.counts.any():
            continue
        assert np.linalg.eigvalsh(merged.covariance).min() >= -1e-9 * np.abs(merged.covariance).max()
        for bias in (False, True):
            weights, biases, share = solve(merged, bias)
            assert np.isfinite(weights).all() and np.isfinite(biases).all() and 0 <= share <= 1
            unseen = weights[merged.counts == 0]
            assert not unseen.any() if bias else (unseen == weights[merged.counts > 0].mean(axis=0)).all()


@laws
@given(dealt())
def test_something_is_always_believed(case):
    features, classes, count, clients, _ = case
    found = merge(told(features, classes, count, clients), FAR)
    assert (found.counts > 0).tolist() == (np.bincount(classes, minlength=count) > 0).tolist()


def test_a_weight_is_as_many_times_the_rows():
    features, classes = FLAT
    double = statistics_of(np.repeat(features, 2, axis=0), np.repeat(classes, 2), 2)
    one = statistics_of(features, classes, 2).weighted(2.0)
    assert one.rows == 10 and one.freedom == 6 and double.freedom == 8
    np.testing.assert_allclose(one.counts, double.counts)
    np.testing.assert_allclose(one.means, double.means)
    np.testing.assert_allclose(one.scatter, double.scatter)
    assert statistics_of(features, classes, 2, scatter=False).weighted(0.5).scatter is None


# -- liars ----------------------------------------------------------------------------------------------------------
COUNT, WIDTH, CLIENTS = 10, 16, 20
rng = np.random.default_rng(7)
CENTRES, MIX = 1.0 * rng.normal(size=(COUNT, WIDTH)), rng.normal(size=(WIDTH, WIDTH)) / 4 + 0.4 * np.eye(WIDTH)


def sample(rows, seed):
    draws = np.random.default_rng(seed)
    classes = draws.integers(0, COUNT, rows)
    return draws.normal(size=(rows, WIDTH)) @ MIX.T + CENTRES[classes], classes


TEST = sample(4000, 1)
FEATURES, CLASSES = sample(CLIENTS * 60, 0)
HONEST = told(FEATURES, CLASSES, COUNT, np.arange(CLIENTS * 60) % CLIENTS)


def accuracy(clients, far, bias=True):
    weights, biases, _ = solve(merge(clients, far), bias)
    return float((predicted(weights, biases, TEST[0]) == TEST[1]).mean())


def flipped(one):
    """Every label is the next one."""
    return Statistics(np.roll(one.counts, 1), np.roll(one.means, 1, axis=0), one.scatter, one.freedom)


def far_means(one):
    return Statistics(one.counts, one.means * 1000, one.scatter, one.freedom)


def wide_scatter(one):
    return Statistics(one.counts, one.means, one.scatter * 1000, one.freedom)


def needle(one):
    """All of the trace along the two classes' difference that matters most."""
    along = CENTRES[0] - CENTRES[1]
    return Statistics(one.counts, one.means, np.trace(one.scatter) * np.outer(along, along) / (along @ along), one.freedom)


def wide_needle(one):
    return wide_scatter(needle(one))


def no_scatter(one):
    return Statistics(one.counts, one.means, one.scatter * 0, one.freedom)


def many(change):
    """The same, with three times the median of rows, as much as strategy.weight-cap lets through by default."""
    return lambda one: change(one).weighted(3.0)


def only_one_class(one):
    """All rows are said to be of one class, far from where it is."""
    counts = np.zeros(COUNT)
    counts[0] = 3 * one.rows
    return Statistics(counts, np.tile(-3 * CENTRES[0], (COUNT, 1)), one.scatter, one.freedom)


ATTACKS = {
    "flipped": flipped,
    "far-means": far_means,
    "wide-scatter": wide_scatter,
    "needle": needle,
    "wide-needle": wide_needle,
    "no-scatter": no_scatter,
    "flipped-many": many(flipped),
    "far-means-many": many(far_means),
    "wide-scatter-many": many(wide_scatter),
    "wide-needle-many": many(wide_needle),
    "only-one-class": only_one_class,
}


@pytest.mark.parametrize("bias", [True, False])
def test_honest_clients_lose_nothing_by_robustness(bias):
    plain, robust = (accuracy(HONEST, far, bias) for far in (0.0, FAR))
    assert plain > 0.6 and robust >= plain - 0.005
    kept = believable(list(HONEST.values()))
    assert all(one.scatter is not None for one in kept)
    assert sum(one.rows for one in kept) > 0.98 * len(CLASSES)


def test_of_equal_draws_everything_is_believed():
    """Enough rows of each class, so that chance alone takes no mean beyond three times the usual."""
    features, classes = sample(6000, 3)
    parts = told(features, classes, COUNT, np.arange(6000) % 6)
    one, other = merge(parts), merge(parts, FAR)
    assert close(one, other, np.abs(features).max(), 1e-12)


@pytest.mark.parametrize("attack", ATTACKS)
def test_one_liar_of_twenty_costs_at_most_two_points(attack):
    lied = {**HONEST, "7": ATTACKS[attack](HONEST["7"])}
    assert accuracy(lied, FAR) >= accuracy(HONEST, 0.0) - 0.02


@pytest.mark.parametrize("attack", ["far-means", "far-means-many", "wide-scatter", "wide-scatter-many", "wide-needle"])
def test_a_gross_liar_costs_nothing_at_a_far_bound_either(attack):
    """strategy.norm-bound is 20 by default, and honest clients are nowhere near it."""
    lied = {**HONEST, "7": ATTACKS[attack](HONEST["7"])}
    assert accuracy(lied, 20.0) >= accuracy(HONEST, 0.0) - 0.02
    assert same_bits(merge(HONEST, 20.0), merge(HONEST))


def test_without_robustness_liars_cost_more():
    before = accuracy(HONEST, 0.0)
    costs = {name: before - accuracy({**HONEST, "7": attack(HONEST["7"])}, 0.0) for name, attack in ATTACKS.items()}
    assert costs["far-means"] > 0.1 and costs["wide-needle"] > 0.02, costs


@pytest.mark.parametrize("alpha", [0.1, 0.5])
def test_label_skew_is_no_lie(alpha):
    """Clients that hold few classes: robustness leaves out at most a little of what is true."""
    draws = np.random.default_rng(5)
    shares = draws.dirichlet([alpha] * CLIENTS, COUNT)
    clients = np.array([draws.choice(CLIENTS, p=shares[label]) for label in CLASSES])
    parts = told(FEATURES, CLASSES, COUNT, clients)
    plain, robust = (accuracy(parts, far) for far in (0.0, FAR))
    assert plain == pytest.approx(accuracy(HONEST, 0.0), abs=1e-12) and robust >= plain - 0.01


@pytest.mark.parametrize("lie", [wide_scatter, needle, no_scatter])
def test_a_scatter_unlike_the_others_is_left_out_and_the_means_are_kept(lie):
    kept = believable([*list(HONEST.values())[1:], lie(HONEST["0"])])
    assert [one.scatter is None for one in kept] == [False] * 19 + [True]
    assert kept[-1].rows > 0.9 * HONEST["0"].rows


@pytest.mark.parametrize("lie", [flipped, far_means])
def test_means_unlike_the_others_are_left_out_and_the_scatter_is_kept(lie):
    lied = believable([*list(HONEST.values())[1:], lie(HONEST["0"])])[-1]
    assert lied.scatter is not None and lied.rows < 0.5 * HONEST["0"].rows


def test_a_mean_of_few_rows_may_be_far_by_chance():
    """Twenty have 200 rows of the class, one has a single row: it differs 14 times as much, which is no more than it may."""
    draws = np.random.default_rng(0)
    many = [statistics_of(draws.normal(size=(200, 8)), np.zeros(200, np.int64), 1) for _ in range(20)]
    single = statistics_of(draws.normal(size=(1, 8)), np.zeros(1, np.int64), 1)
    assert [one.rows for one in believable([*many, single])] == [200] * 20 + [1]
    lie = Statistics(single.counts * 200, single.means, many[0].scatter, many[0].freedom)
    assert [one.rows for one in believable([*many, lie])] == [200] * 20 + [0]


def test_of_a_class_that_two_have_both_are_believed():
    ours, theirs = np.array([[0.0, 1.0]] * 4), np.array([[1000.0, 1.0]] * 4)
    kept = believable([statistics_of(rows, np.zeros(4, np.int64), 1) for rows in (ours, theirs)])
    assert [one.rows for one in kept] == [4, 4]


# -- the scale of the logits ----------------------------------------------------------------------------------------
@pytest.mark.parametrize("scale", [0.2, 1.5, 40.0])
def test_a_known_temperature_is_found(scale):
    """Two logits ±a: at shares p of hits the best factor f has 1/(1 + e^(-2·f·a)) = p."""
    hits, rows = 3, 4
    logits = np.tile([scale, -scale], (rows, 1))
    classes = np.array([0] * hits + [1] * (rows - hits))
    best = math.log(hits / (rows - hits)) / (2 * scale)
    assert temperature(logits, classes, bias=False) == pytest.approx(best, rel=1e-4)
    assert temperature(logits, classes, bias=True) == pytest.approx(min(best, 1.0), rel=1e-4)


@laws
@given(dealt())
def test_the_temperature_is_no_worse_than_its_neighbours(case):
    logits, classes, _, clients, rng = case
    classes = rng.integers(0, logits.shape[1], len(logits))

    def loss(factor):
        scaled = factor * logits
        return np.mean(np.logaddexp.reduce(scaled, axis=1) - scaled[np.arange(len(classes)), classes])

    found = temperature(logits, classes, bias=True)
    assert 0 < found <= 1
    least = min(loss(factor) for factor in (1e-3, 0.01, 0.1, 0.5, 1.0))
    assert loss(found) <= least + 1e-5 * np.abs(logits).max()  # the factor is found to a millionth
    assert temperature(logits, classes, bias=False) > 0


def test_all_rows_right_do_not_heat_a_head_with_bias():
    logits, classes = 3.0 * np.eye(4), np.arange(4)
    assert temperature(logits, classes, bias=True) == pytest.approx(1.0, abs=1e-5)
    assert temperature(logits, classes, bias=True) <= 1.0
    assert temperature(logits, classes, bias=False) > 10


@pytest.mark.parametrize("bias", [False, True])
def test_without_rows_the_temperature_is_one(bias):
    assert temperature(np.zeros((0, 4)), np.zeros(0, np.int64), bias) == 1.0


# -- the triangle that travels --------------------------------------------------------------------------------------
@pytest.mark.parametrize("width", [1, 2, 7])
def test_a_triangle_and_back(width):
    half = np.random.default_rng(0).normal(size=(width, width))
    matrix = half + half.T
    assert len(upper(matrix)) == width * (width + 1) // 2
    assert np.array_equal(from_upper(upper(matrix), width), matrix)
    numbers = np.arange(width * (width + 1) // 2, dtype=np.float64)
    assert np.array_equal(upper(from_upper(numbers, width)), numbers)


def test_the_triangle_goes_row_by_row():
    assert upper(np.array([[1, 2, 3], [2, 4, 5], [3, 5, 6]])).tolist() == [1, 2, 3, 4, 5, 6]


def test_batches_give_what_all_rows_give_at_once():
    """Far from the origin, where squares about it would lose the spread; one batch is empty."""
    rng = np.random.default_rng(3)
    features, classes = 1e6 + rng.normal(size=(90, 3)), rng.integers(0, 3, 90)
    whole = statistics_of(features, classes, 4)
    pieces = [slice(0, 0), slice(0, 7), slice(7, 8), slice(8, 90)]
    parts = Statistics.of([(features[piece], classes[piece]) for piece in pieces], 4)
    np.testing.assert_array_equal(parts.counts, whole.counts)
    np.testing.assert_allclose(parts.means, whole.means, rtol=1e-14)
    np.testing.assert_allclose(parts.scatter, whole.scatter, rtol=1e-6, atol=1e-6)
    exact = sum(np.outer(x - m, x - m) for x, m in zip(features, whole.means[classes], strict=True))
    np.testing.assert_allclose(whole.scatter, exact, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("clients", "diversity"),
    [
        ([[4, 4], [2, 2]], 1.0),  # everyone has both labels, evenly
        ([[3, 0], [0, 3]], 0.0),  # one label each
        ([[2, 2], [4, 0], [0, 4]], 1 / 3),  # a third of the rows is with a client that has both
        ([[5, 0], [2, 0]], 1.0),  # there is one label
    ],
)
def test_diversity_is_the_clients_entropy_over_that_of_all(clients, diversity):
    told = {}
    for key, counts in enumerate(clients):
        classes = np.repeat([0, 1], counts)
        told[str(key)] = statistics_of(np.random.default_rng(key).normal(size=(len(classes), 2)), classes, 2)
    assert merge(told).diversity == pytest.approx(diversity)
