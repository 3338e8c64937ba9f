"""How much more probable a wrong human label is on its own image than on others of the class."""

import numpy as np
import pytest

from benchmarks.label_order import preference


def test_by_hand():
    """Label 1 of image 1 has log 0.3; over both images of its class the mean is that of log 0.1 and log 0.3."""
    log_p = np.log([[0.9, 0.1], [0.7, 0.3], [0.2, 0.8], [0.4, 0.6]])
    mean, error, count = preference(log_p, human=np.array([0, 1, 1, 0]), right=np.array([0, 0, 1, 1]))
    first, second = np.log(0.3) - np.log(0.1 * 0.3) / 2, np.log(0.4) - np.log(0.2 * 0.4) / 2
    assert count == 2 and mean == pytest.approx((first + second) / 2)
    assert error == pytest.approx(abs(first - second) / 2)  # of two values: half their distance


def test_labels_in_another_order_within_the_classes_are_not_preferred():
    draw = np.random.default_rng(0)
    right = np.repeat(np.arange(4), 500)
    p = draw.dirichlet(np.ones(4), len(right))
    human = np.array([draw.choice(4, p=row) for row in p])
    mean, error, _ = preference(np.log(p), human, right)
    assert mean > 10 * error
    other = np.concatenate([draw.permutation(human[right == label]) for label in range(4)])
    mean, error, _ = preference(np.log(p), other, right)
    assert abs(mean) < 4 * error
