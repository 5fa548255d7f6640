import itertools
import math
import re

import numpy as np
import pytest

from holdfast.erasure import survival
from holdfast.erasure.groups import Grouping, form_groups
from holdfast.erasure.redundancy import Redundancy
from holdfast.erasure.survival import group_survival, job_survival, node_survival, survival_of_losses


def grouping(num_nodes: int, spec: str) -> Grouping:
    return form_groups({node: str(node) for node in range(num_nodes)}, Redundancy.parse(spec))


@pytest.mark.parametrize("spec", ["auto", "mirror", "2+1", "2+2", "4+2", "none"])
@pytest.mark.parametrize("num_lost", range(5))
def test_survivable_patterns_are_counted_as_by_trying_all(spec: str, num_lost: int) -> None:
    nodes = grouping(10, spec)
    patterns = list(itertools.combinations(range(10), num_lost))
    survived = sum(nodes.survives(lost) for lost in patterns)
    assert survival_of_losses(nodes, num_lost) == pytest.approx(survived / len(patterns), abs=1e-12)


@pytest.mark.parametrize("spec", ["mirror", "3+1", "6+2", "12+4"])
@pytest.mark.parametrize(("num_nodes", "num_lost"), [(16, 3), (128, 3), (128, 8)])
def test_random_losses_in_simulation_survive_as_often_as_the_formula_says(
    spec: str, num_nodes: int, num_lost: int
) -> None:
    nodes = grouping(num_nodes, spec)
    random = np.random.default_rng(7)
    trials = 600
    survived = sum(nodes.survives(random.choice(num_nodes, num_lost, replace=False).tolist()) for _ in range(trials))
    expected = survival_of_losses(nodes, num_lost)
    deviation = math.sqrt(expected * (1 - expected) / trials)
    assert abs(survived / trials - expected) <= 5 * deviation + 1e-9


@pytest.mark.parametrize("spec", ["mirror", "3+1", "6+2"])
def test_independent_losses_in_simulation_survive_as_often_as_the_formula_says(spec: str) -> None:
    nodes = grouping(16, spec)
    random = np.random.default_rng(11)
    trials, loss = 1500, 0.1
    survived = sum(nodes.survives(np.flatnonzero(random.random(16) < loss).tolist()) for _ in range(trials))
    expected = job_survival(nodes, loss)
    assert abs(survived / trials - expected) <= 5 * math.sqrt(expected * (1 - expected) / trials)


def test_one_raid5_group_follows_its_textbook_formula() -> None:
    alive = 0.97
    assert group_survival(8, 1, 1 - alive) == pytest.approx(alive**8 + 8 * alive**7 * (1 - alive))
    assert group_survival(1, 0, 0.25) == pytest.approx(0.75)
    assert group_survival(2, 5, 0.25) == pytest.approx(1)


@pytest.mark.parametrize("num_nodes", [16, 128])
def test_mirrored_pairs_reach_geminis_bound_for_two_losses(num_nodes: int) -> None:
    """Wang et al., "Gemini" (SOSP'23), theorem 1 with m = k = 2: 1 - N / (2 C(N, 2))."""
    bound = 1 - num_nodes / (2 * math.comb(num_nodes, 2))
    assert survival_of_losses(grouping(num_nodes, "mirror"), 2) == pytest.approx(bound)


def test_node_survival_is_exponential_with_shape_one() -> None:
    assert node_survival(0, 100) == 1
    assert node_survival(50, 100) == pytest.approx(math.exp(-0.5))
    assert node_survival(50, 100, shape=2) == pytest.approx(math.exp(-0.25))


def test_more_losses_than_nodes_survive_never() -> None:
    assert survival_of_losses(grouping(4, "auto"), 5) == 0


def test_documented_table_is_what_the_formula_gives() -> None:
    assert survival.__doc__ is not None
    rows = re.findall(r"^ +(\d+) +(\d) +((?:[01]\.\d{4} *){6})$", survival.__doc__, re.MULTILINE)
    assert len(rows) == 5
    for num_nodes, num_lost, values in rows:
        for spec, value in zip(("mirror", "3+1", "7+1", "4+2", "6+2", "12+4"), values.split(), strict=True):
            assert f"{survival_of_losses(grouping(int(num_nodes), spec), int(num_lost)):.4f}" == value
