import math

import pytest
import torch
from torch import Tensor

from training.evaluation import statistics
from training.evaluation.statistics import Moments, accuracy, frechet_distance, kernel_distance, precision_recall


def normals(n: int, size: int = 6, seed: int = 0) -> Tensor:
    return torch.randn(n, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def moments(rows: Tensor) -> Moments:
    return Moments(rows.shape[1]).add(rows)


def of(mean: Tensor, covariance: Tensor) -> Moments:
    """Exactly these: the rows ± √F·(column of the root), moved."""
    size = len(mean)
    root = torch.linalg.cholesky(covariance) * math.sqrt((2 * size - 1) / 2)
    return moments(torch.cat([root.T, -root.T]) + mean)


def covariance(size: int, seed: int) -> Tensor:
    a = normals(size, size, seed)
    return a @ a.T + 0.1 * torch.eye(size, dtype=torch.float64)


def test_moments_are_those_of_numpy_however_the_rows_are_cut() -> None:
    rows = normals(101) * torch.tensor([1.0, 2, 3, 1e-3, 5, 6]) + 1e4
    for sizes in ([101], [1] * 101, [50, 0, 51], [3, 98]):
        m = Moments(6)
        for part in rows.split(sizes):
            m.add(part)
        assert m.count == 101
        torch.testing.assert_close(m.mean, rows.mean(0), rtol=1e-14, atol=0)
        torch.testing.assert_close(m.covariance, torch.cov(rows.T), rtol=1e-7, atol=1e-11)


def test_moments_of_float32_rows_are_summed_in_float64() -> None:
    rows = (normals(5000, 2) + 1000).float()
    m = Moments(2)
    for part in rows.split(7):
        m.add(part)
    torch.testing.assert_close(m.covariance, torch.cov(rows.double().T), rtol=1e-9, atol=1e-9)


def test_one_image_has_no_covariance() -> None:
    with pytest.raises(ValueError, match="two images"):
        _ = moments(normals(1)).covariance


def test_the_square_root_squares_to_the_matrix() -> None:
    for matrix in (covariance(7, 0), torch.diag(torch.tensor([4.0, 0, 1e-12]).double())):
        root = statistics.square_root(matrix)
        torch.testing.assert_close(root @ root, matrix, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(root, root.T)


def test_frechet_distance_of_diagonal_gaussians_is_closed_form() -> None:
    mu, nu = normals(2, 5)
    s, t = normals(2, 5, seed=1).abs() + 0.1  # standard deviations
    expected = float(((mu - nu) ** 2).sum() + ((s - t) ** 2).sum())
    assert frechet_distance(of(mu, torch.diag(s**2)), of(nu, torch.diag(t**2))) == pytest.approx(expected, rel=1e-10)


def test_frechet_distance_agrees_with_the_products_eigenvalues() -> None:
    """tr (AB)^½ from the eigenvalues of AB itself, which is not symmetric."""
    a, b, zero = covariance(8, 1), covariance(8, 2), torch.zeros(8).double()
    roots = torch.linalg.eigvals(a @ b).real.sqrt().sum()
    expected = float(a.trace() + b.trace() - 2 * roots)
    assert frechet_distance(of(zero, a), of(zero, b)) == pytest.approx(expected, rel=1e-9)
    assert frechet_distance(of(zero, b), of(zero, a)) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("n", [100, 4])  # 4 in 6 dimensions: the covariance is singular
def test_a_set_is_at_no_distance_from_itself(n: int) -> None:
    rows = normals(n)
    assert 0 <= frechet_distance(moments(rows), moments(rows)) < 1e-12
    assert frechet_distance(moments(rows), moments(rows.flip(0))) < 1e-12


def test_a_shift_is_counted_whole() -> None:
    rows = normals(50)
    assert frechet_distance(moments(rows), moments(rows + 2)) == pytest.approx(6 * 4, rel=1e-9)


def mean_and_error(values: list[float]) -> tuple[float, float]:
    found = torch.tensor(values, dtype=torch.float64)
    return float(found.mean()), float(found.std() / math.sqrt(len(found)))


def test_the_kernel_distance_is_unbiased() -> None:
    """Its mean over many pairs of small sets of one distribution is 0."""
    pairs = [(normals(20, seed=2 * i), normals(20, seed=2 * i + 1)) for i in range(400)]
    distances = [kernel_distance(x, y, subsets=1)[0] for x, y in pairs]
    mean, error = mean_and_error(distances)
    assert abs(mean) < 3 * error < 0.1
    assert min(distances) < 0
    assert kernel_distance(normals(200), normals(200, seed=1) + 0.5)[0] > 0.3


def test_the_kernel_distance_of_balanced_sets_is_unbiased() -> None:
    """Four classes far apart, six images of each: the plain estimate is far below 0."""
    centres = 2 * normals(4, seed=1000).repeat(6, 1)
    pairs = [(centres + normals(24, seed=2 * i), centres + normals(24, seed=2 * i + 1)) for i in range(300)]
    mean, error = mean_and_error([kernel_distance(x, y, 4, subsets=1)[0] for x, y in pairs])
    assert abs(mean) < 3 * error
    plain, plain_error = mean_and_error([kernel_distance(x, y, 1, subsets=1)[0] for x, y in pairs])
    assert plain < -10 * plain_error


@pytest.mark.parametrize("classes", [1, 3])
def test_the_kernel_distance_is_the_formula(classes: int) -> None:
    """Over pairs of classes, each as likely, the mean over pairs of different images."""
    x, y = normals(6, 3), normals(6, 3, seed=1) + 1

    def k(a: Tensor, b: Tensor) -> float:
        return (float(a @ b) / 3 + 1) ** 3

    def within(z: Tensor) -> float:
        means = []
        for c in range(classes):
            for d in range(classes):
                pairs = [(i, j) for i in range(c, 6, classes) for j in range(d, 6, classes) if i != j]
                means.append(sum(k(z[i], z[j]) for i, j in pairs) / len(pairs))
        return sum(means) / len(means)

    between = sum(k(p, q) for p in x for q in y) / 36
    mean, deviation = kernel_distance(x, y, classes, subsets=3)
    assert mean == pytest.approx(within(x) + within(y) - 2 * between, rel=1e-10)
    assert deviation == pytest.approx(0, abs=1e-10)  # the subsets are the sets


def test_subsets_of_balanced_sets_are_balanced() -> None:
    """Where images of a class are all alike, a subset is as good as the set."""
    x, y = normals(3).repeat(40, 1), normals(3, seed=1).repeat(40, 1)
    mean, deviation = kernel_distance(x, y, 3, subset_size=30)
    assert mean == pytest.approx(kernel_distance(x, y, 3, subset_size=120)[0])
    assert deviation == pytest.approx(0, abs=1e-10)


def test_subsets_are_drawn_anew_and_by_the_seed() -> None:
    x, y = normals(300), normals(300, seed=1)
    first = kernel_distance(x, y, subsets=10, subset_size=50)
    assert first[1] > 0
    assert first == kernel_distance(x, y, subsets=10, subset_size=50)
    assert first != kernel_distance(x, y, subsets=10, subset_size=50, seed=1)
    assert kernel_distance(x, y, 3, subsets=10, subset_size=150)[1] > 1e-4  # of 150 in all


@pytest.mark.parametrize("rows", [7, 1000])
def test_precision_and_recall_are_1_of_equal_and_0_of_far_sets(rows: int) -> None:
    x = normals(60)
    assert precision_recall(x, x, rows=rows) == (1, 1)
    assert precision_recall(x, x.flip(0), rows=rows) == (1, 1)
    assert precision_recall(x, x + 100, rows=rows) == (0, 0)


def test_a_few_good_modes_are_precise_and_recall_little() -> None:
    real = torch.cat([normals(100, seed=k) + 50 * k for k in range(10)])
    collapsed = torch.cat([normals(500, seed=20 + k) + 50 * k for k in range(2)])
    precision, recall = precision_recall(real, collapsed)
    assert precision > 0.7
    assert 0.1 < recall < 0.2
    precision, recall = precision_recall(collapsed, real)  # the other way round: much that should not be there
    assert 0.1 < precision < 0.2
    assert recall > 0.7


def test_precision_and_recall_are_those_of_a_plain_loop() -> None:
    real, generated = normals(30, 2), normals(25, 2, seed=1) + 1.5

    def inside(points: Tensor, others: Tensor, k: int) -> float:
        radii = [float((others[j] - others).norm(dim=1).sort().values[k]) for j in range(len(others))]
        hits = [any((p - o).norm() <= r for o, r in zip(others, radii, strict=True)) for p in points]
        return sum(hits) / len(hits)

    for k in (1, 2, 3):
        precision, recall = precision_recall(real, generated, k=k, rows=8)
        assert precision == pytest.approx(inside(generated, real, k))
        assert recall == pytest.approx(inside(real, generated, k))
        assert 0 < recall < 1


def test_too_few_images_are_refused() -> None:
    with pytest.raises(ValueError, match="more than 3"):
        precision_recall(normals(3), normals(9))
    with pytest.raises(ValueError, match="two images of each class"):
        kernel_distance(normals(1), normals(9))
    with pytest.raises(ValueError, match="two images of each class"):
        kernel_distance(normals(9), normals(3), 3)


def test_accuracy_is_counted_by_class() -> None:
    logits = torch.tensor([[2.0, 1, 0], [0, 1, 2], [0, 3, 1], [1, 0, 0]])
    assert accuracy(logits, torch.tensor([0, 1, 1, 2]), 3) == (0.5, [1.0, 0.5, 0.0])
