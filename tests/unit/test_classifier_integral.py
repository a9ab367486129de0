import numpy as np
import pytest

from cluster.engines.classifier.explain.integral import NODES, WEIGHTS, integrate


def test_the_quadrature_is_exact_up_to_degree_seven():
    for degree in range(8):
        assert (WEIGHTS @ NODES**degree) == pytest.approx(1 / (degree + 1))


class Path:
    """Path with two tokens that records the evaluated points."""

    def __init__(self, *scores_and_slopes):
        self.functions = scores_and_slopes
        self.asked = []

    def __call__(self, points):
        assert len(points)
        self.asked += points
        x = np.array(points)
        scores = np.stack([score(x) for score, _ in self.functions], 1)
        slopes = np.stack([np.stack(slope(x), 1) for _, slope in self.functions], 1)
        return scores, slopes


def smooth(x):
    return x**3 + 2 * x, (3 * x**2, 2 + 0 * x)


def steep(width):
    def score(x):
        return 1 / (1 + np.exp(-(x - 0.3) / width))

    return score, lambda x: (score(x) * (1 - score(x)) / width, 0 * x)


def test_a_smooth_path_takes_few_points():
    path = Path((lambda x: smooth(x)[0], lambda x: smooth(x)[1]))
    found = integrate(path)
    np.testing.assert_allclose(found.parts, [[1, 2]], atol=1e-12)
    assert (found.start, found.end) == ([0], [3])
    assert found.num_points == len(path.asked) == 9
    np.testing.assert_allclose(found.error, [0], atol=1e-12)


@pytest.mark.parametrize("width", [0.1, 0.02, 0.004])
def test_points_go_where_the_score_is_steep(width):
    path = Path(steep(width), (lambda x: 0.1 * x, lambda x: (0 * x, 0.1 + 0 * x)))
    found = integrate(path)
    score = steep(width)[0]
    assert abs(found.error[0]) < 0.01
    assert found.parts[0, 0] == pytest.approx(score(1.0) - score(0.0), rel=0.01)
    assert found.parts[1].tolist() == pytest.approx([0, 0.1])
    assert len(set(path.asked)) == len(path.asked) == found.num_points <= 100
    if width < 0.05:
        near = sum(0.2 < x < 0.4 for x in path.asked)
        assert near > len(path.asked) / 3


def test_a_jump_ends_at_the_limit_and_is_reported_as_error():
    path = Path((lambda x: (x > 0.123456).astype(float), lambda x: (0 * x, 0 * x)))
    found = integrate(path, max_points=60)
    assert found.num_points <= 60
    assert found.error.tolist() == [-1.0]


def test_a_constant_path():
    found = integrate(Path((lambda x: 0 * x, lambda x: (0 * x, 0 * x))))
    assert found.num_points == 9
    assert found.parts.tolist() == [[0, 0]]
