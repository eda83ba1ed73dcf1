"""IMTL-G, ConFIG and Aligned-MTL: their definitions, what they promise, and where they give way."""

import pytest
import torch

from megatron_moo.aggregation.aligned import AlignedMTL
from megatron_moo.aggregation.imtl import IMTLG, ConFIG
from megatron_moo.aggregation.spectral import inverse, jacobi_eigh, presence
from tests.unit.aggregation.families import FAMILIES, B, combine, gramian, make_preference, make_rows, size

# Families whose rows of length 1 are independent beyond the threshold.
INDEPENDENT = ("random", "conflicting", "aligned", "uneven", "very-uneven", "ill-conditioned")
SIZES = (1, 2, 5, 16, 64)
DEPENDENT = 1e-5  # of the largest eigenvalue: above the threshold by more than its width


def products(weights, rows):
    """Products of the combined direction with the rows of length 1 [B, K]."""
    return (rows @ combine(weights, rows)[..., None])[..., 0] / rows.norm(dim=2).clamp(min=1e-300)


def independent(rows):
    """Blocks whose unit rows are independent beyond the threshold [B]."""
    unit = rows / rows.norm(dim=2, keepdim=True).clamp(min=1e-300)
    values = torch.linalg.eigvalsh(gramian(unit))
    return values[:, 0] > DEPENDENT * values[:, -1]


# --- eigenvalues ---


@pytest.mark.parametrize("k", SIZES)
def test_jacobi_agrees_with_lapack(k):
    """The accelerator's eigenvalues: too few sweeps, a pair that never meets, a turned rotation."""
    for family in FAMILIES:
        matrix = gramian(make_rows(family, k))
        matrix = matrix / matrix.diagonal(dim1=1, dim2=2).amax(1)[:, None, None].clamp(min=1e-300)
        values, vectors = jacobi_eigh(matrix)
        scale = max(k, 4) * 1e-15 * torch.linalg.matrix_norm(matrix)[:, None]
        if family == "ill-conditioned":  # twelve orders of magnitude in one spectrum converge last
            scale = 100 * scale
        assert ((values.sort(1).values - torch.linalg.eigvalsh(matrix)).abs() <= scale).all()
        again = vectors * values[:, None] @ vectors.mT
        assert ((again - matrix).abs() <= 4 * scale[..., None]).all()
        eye = torch.eye(k, dtype=torch.float64)
        assert ((vectors.mT @ vectors - eye).abs() <= 1e-13 * max(k, 4)).all()


@pytest.mark.parametrize("method", [IMTLG, ConFIG, AlignedMTL])
def test_accelerators_get_the_same_weights(method, monkeypatch):
    """Eigenvectors used in an order, or with a sign, that only LAPACK's have."""
    for family in ("random", "duplicates", "rank-three", "uneven"):
        rows = make_rows(family, 7)
        expected = method()(gramian(rows), None, make_preference(7))
        with monkeypatch.context() as patch:
            patch.setattr("megatron_moo.aggregation.imtl.eigh", jacobi_eigh)
            patch.setattr("megatron_moo.aggregation.aligned.eigh", jacobi_eigh)
            weights = method()(gramian(rows), None, make_preference(7))
        distance = (combine(weights, rows) - combine(expected, rows)).norm(dim=1)
        assert (distance <= 1e-9 * size(expected, rows)).all()


def test_small_eigenvalues_fade_out():
    """A jump at the threshold: weights would flicker between steps."""
    values = torch.cat([torch.ones(1), torch.logspace(-12, -4, 2000)]).double()[None]
    assert torch.equal(presence(values)[values > 2.6e-6], torch.ones_like(values[values > 2.6e-6]))
    assert (inverse(values)[values < 1e-10] < 1e-4).all()
    assert (presence(values)[0, 1:].diff() < 0.02).all()
    noisy = torch.tensor([[1.0, 1e-5, -1e-5, 1e-2]], dtype=torch.float64)
    assert (presence(noisy)[0, 1:3] < 1e-3).all() and presence(noisy)[0, 3] == 1
    assert (inverse(torch.zeros(2, 3).double()) == 0).all()


# --- IMTL-G ---


@pytest.mark.parametrize("k", SIZES)
@pytest.mark.parametrize("family", INDEPENDENT)
def test_cosines_are_equal_and_positive(family, k):
    """The defining equation; a direction that is turned round where the paper's weights have a negative sum."""
    rows = make_rows(family, k)
    whole = independent(rows)
    if not whole.any():
        assert family == "ill-conditioned" or k > 5
    for method in (IMTLG(), ConFIG()):
        weights = method(gramian(rows), None, make_preference(k))
        found = products(weights, rows)[whole]
        allowed = 1e-9 * size(weights, rows)[whole][:, None]
        assert ((found - found.mean(1, keepdim=True)).abs() <= allowed).all()
        assert (found > -allowed).all()


@pytest.mark.parametrize("family", FAMILIES)
def test_imtl_length(family):
    """Where the paper's sum of weights is small or negative its step is huge or uphill."""
    for k in SIZES:
        rows = make_rows(family, k)
        weights = IMTLG()(gramian(rows))
        longest = rows.norm(dim=2).amax(1)
        length = combine(weights, rows).norm(dim=1)
        assert (length <= (1 + 1e-9) * longest).all()
        sums = weights.sum(1)
        short = length < (1 - 1e-9) * longest
        # Sum 1 where the length is the paper's. None where no direction is left.
        assert ((sums[short] - 1).abs() < 1e-9).logical_or(length[short] <= 1e-6 * longest[short]).all()
        assert (sums < 1 + 1e-9).all()


def test_imtl_where_the_sum_is_negative():
    """A step uphill for everybody: the paper's weights with a negative sum, because a short row has a negative one."""
    rows = torch.tensor([[[1.0, 0.0, 0.0], [0.9, 0.436, 0.0], [0.6, 0.8, 0.1]]], dtype=torch.float64)
    rows = rows / rows.norm(dim=2, keepdim=True)
    solution = torch.linalg.solve(gramian(rows), torch.ones(1, 3, 1, dtype=torch.float64))[..., 0]
    smallest = int(solution[0].argmin())
    assert solution[0, smallest] < 0
    lengths = torch.ones(3, dtype=torch.float64)
    lengths[smallest] = 1e-3
    rows = rows * lengths[:, None]
    assert (solution / lengths).sum() < 0  # the paper would divide by it
    direction = combine(IMTLG()(gramian(rows)), rows)
    assert direction.norm(dim=1).item() == pytest.approx(1.0)
    assert (products(IMTLG()(gramian(rows)), rows) > 0).all()


def test_duplicates_count_once():
    """Two copies of a language that count double, or make the matrix singular."""
    rows = make_rows("random", 4)
    for method in (IMTLG(), ConFIG()):
        once = combine(method(gramian(rows)), rows)
        twice = rows[:, [0, 1, 1, 2, 3, 3]]
        weights = method(gramian(twice), None, torch.tensor([2.0, 1.0, 1.0, 2.0, 1.0, 1.0]).double() / 8)
        torch.testing.assert_close(combine(weights, twice), once, rtol=1e-8, atol=1e-9)
        torch.testing.assert_close(weights[:, 1], weights[:, 2])


@pytest.mark.parametrize("method", [IMTLG, ConFIG])
def test_opposite_rows_stop(method):
    """Rounding blown up to a step of full length where no direction has a positive cosine with both."""
    rows = make_rows("opposite", 2)
    assert (combine(method()(gramian(rows)), rows) == 0).all()


# --- ConFIG ---


def test_config_is_the_projection_of_the_mean():
    """A length that does not follow the preference, or is K times that of the mean."""
    rows, preference = make_rows("random", 5), make_preference(5)
    direction = combine(ConFIG()(gramian(rows), None, preference), rows)
    mean = combine(preference.expand(B, 5), rows)
    torch.testing.assert_close((mean * direction).sum(1), direction.square().sum(1))
    assert torch.nn.functional.cosine_similarity(direction, combine(IMTLG()(gramian(rows)), rows)).min() > 1 - 1e-9


def test_config_cosines_by_preference():
    """A preference that enters twice, or not at all."""
    rows, preference = make_rows("random", 5), make_preference(5)
    found = products(ConFIG(cosines="preference")(gramian(rows), None, preference), rows)
    torch.testing.assert_close(found / found.sum(1, keepdim=True), preference.expand(B, 5), rtol=1e-9, atol=0)


# --- Aligned-MTL ---


@pytest.mark.parametrize("k", SIZES)
def test_aligned_rows_are_orthogonal(k):
    """A transform that leaves correlations, or scales by another eigenvalue than it says."""
    rows = make_rows("random", k)
    values = torch.linalg.eigvalsh(gramian(rows))
    scales = {"min": values[:, 0], "median": values[:, (k - 1) // 2], "rmse": values.mean(1)}
    for scale, expected in scales.items():
        # With the preference on one objective at a time, d is that objective's aligned row.
        weights = []
        for objective in range(k):
            preference = torch.full((k,), 1e-3, dtype=torch.float64)
            preference[objective] += 1
            weights.append(AlignedMTL(scale=scale)(gramian(rows), None, preference))
        uniform = AlignedMTL(scale=scale)(gramian(rows), None, torch.full((k,), 1e-3, dtype=torch.float64))
        aligned = (torch.stack(weights, 1) - uniform[:, None]) @ rows
        target = expected[:, None, None] * torch.eye(k, dtype=torch.float64)
        torch.testing.assert_close(gramian(aligned), target, rtol=1e-8, atol=1e-9)


def test_aligned_leaves_orthogonal_rows_alone():
    """A scale that is not that of the mean."""
    rows = torch.linalg.qr(make_rows("random", 5).mT).Q.mT * 3
    preference = make_preference(5)
    for scale in ("min", "median", "rmse"):
        weights = AlignedMTL(scale=scale)(gramian(rows), None, preference)
        torch.testing.assert_close(weights, preference.expand(B, 5), rtol=1e-9, atol=0)


def test_aligned_does_not_count_what_is_not_there():
    """The eigenvalue of a dependent row taken for the smallest (the step would be rounding), or for the median."""
    rows = make_rows("random", 5)
    for scale in ("min", "median", "rmse"):
        once = combine(AlignedMTL(scale=scale)(gramian(rows)), rows)
        copies = rows[:, [0, 1, 2, 3, 4, 4]] * torch.tensor([1, 1, 1, 1, 0.5**0.5, 0.5**0.5]).double()[:, None]
        preference = torch.tensor([1, 1, 1, 1, 0.5**0.5, 0.5**0.5]).double() / 5
        twice = combine(AlignedMTL(scale=scale)(gramian(copies), None, preference), copies)
        torch.testing.assert_close(twice, once, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("scale", ["min", "rmse"])
def test_aligned_is_continuous(scale):
    """A jump where an eigenvalue passes the threshold. It is steep there, but goes step by step."""
    rows = make_rows("random", 3)[:1]
    steps = torch.logspace(-5, -1, 4000, dtype=torch.float64)
    rows = rows.repeat(len(steps), 1, 1)
    rows[:, 2] = rows[:, 1] + steps[:, None] * rows[:, 2]
    direction = combine(AlignedMTL(scale=scale)(gramian(rows)), rows)
    assert (direction.diff(dim=0).norm(dim=1) < 0.02 * rows[0].norm(dim=1).amax()).all()


# --- against torchjd ---


@pytest.mark.parametrize("k", [1, 2, 5, 16])
def test_agrees_with_torchjd(k):
    """Definitions that are ours alone."""
    theirs = pytest.importorskip("torchjd.aggregation")
    for family in ("random", "conflicting", "aligned", "duplicates", "few-dimensions"):
        rows, preference = make_rows(family, k), make_preference(k)
        gram = gramian(rows)
        for scale in ("min", "median", "rmse"):
            weighting = theirs.AlignedMTLWeighting(preference, scale_mode=scale)
            expected = combine(torch.stack([weighting(matrix) for matrix in gram]), rows)
            found = combine(AlignedMTL(scale=scale)(gram, None, preference), rows)
            torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
        for cosines in ("equal", "preference"):
            uniform = torch.full((k,), 1 / k, dtype=torch.float64)
            given = uniform if cosines == "equal" else preference
            config = theirs.ConFIG(given)
            expected = torch.stack([config(matrix) for matrix in rows])
            found = combine(ConFIG(cosines=cosines)(gram, None, given), rows)
            assert (torch.nn.functional.cosine_similarity(found, expected, dim=1) > 1 - 1e-9).all()
            if cosines == "equal":
                torch.testing.assert_close(found * k, expected, rtol=1e-6, atol=1e-6)
        if family == "few-dimensions" and k > 2:
            continue  # cosines cannot be equal: theirs is least squares of the products, ours of the cosines
        weights = torch.stack([theirs.IMTLGWeighting()(matrix) for matrix in gram])
        expected = combine(weights, rows)
        # Elsewhere it goes uphill, or further than the longest row.
        usual = (products(weights, rows).mean(1) > 0) & (expected.norm(dim=1) <= rows.norm(dim=2).amax(1) + 1e-9)
        assert usual.any()
        torch.testing.assert_close(combine(IMTLG()(gram), rows)[usual], expected[usual], rtol=1e-6, atol=1e-6)


def test_where_torchjd_is_not_accurate():
    """It drops IMTL-G's solution by an absolute threshold, and counts rounding as an eigenvalue of Aligned-MTL's."""
    theirs = pytest.importorskip("torchjd.aggregation")
    rows = make_rows("random", 4)
    large = gramian(1e13 * rows)
    assert all((theirs.IMTLGWeighting()(matrix) == 0).all() for matrix in large)
    torch.testing.assert_close(IMTLG()(large), IMTLG()(gramian(rows)), rtol=1e-9, atol=1e-12)

    dependent = make_rows("rank-three", 5)
    exact = gramian(dependent)
    rounded = (
        exact.float().double()
    )  # as a sum in float32 leaves it: eigenvalues of either sign where there should be none
    ours = [combine(AlignedMTL()(gram), dependent).norm(dim=1) for gram in (exact, rounded)]
    torch.testing.assert_close(ours[1], ours[0], rtol=1e-4, atol=0)
    weighting = theirs.AlignedMTLWeighting()
    short = torch.stack([weighting(matrix) for matrix in rounded])
    assert (combine(short, dependent).norm(dim=1) < 1e-2 * ours[0]).any()
