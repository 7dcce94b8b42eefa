"""Quadrature rules: what they integrate exactly, where they look, and what they refuse."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import singe
from singe.quadrature import (
    Quadrature,
    as_quadrature,
    by_name,
    gauss_legendre,
    geometric,
    midpoint,
    trapezoid,
)

RULES = {"gauss_legendre": gauss_legendre, "midpoint": midpoint, "trapezoid": trapezoid}


def integrate(rule: Quadrature, function) -> float:
    return sum(w * function(mu) for mu, w in zip(rule.nodes, rule.weights, strict=True))


@settings(max_examples=30, deadline=None)
@given(
    name=st.sampled_from([*RULES, "geometric", "riemann_left", "riemann_right"]),
    n=st.integers(2, 64),
)
def test_weights_sum_to_one_and_nodes_lie_on_the_path(name, n):
    rule = by_name(name, n)
    assert len(rule) == len(rule.nodes) == len(rule.weights) == n
    assert sum(rule.weights) == pytest.approx(1.0, abs=1e-12)
    assert all(0.0 <= node <= 1.0 for node in rule.nodes)
    assert all(weight > 0 for weight in rule.weights)
    assert rule.name.startswith(name)


@pytest.mark.parametrize("n", [1, 2, 4, 8])
def test_gauss_legendre_is_exact_up_to_degree_2n_minus_1(n):
    for degree in range(2 * n):
        found = integrate(gauss_legendre(n), lambda mu, d=degree: mu**d)
        assert found == pytest.approx(1 / (degree + 1), abs=1e-14)
    beyond = integrate(gauss_legendre(n), lambda mu: mu ** (2 * n))
    assert abs(beyond - 1 / (2 * n + 1)) > 1e-10


@pytest.mark.parametrize("rule", [midpoint, trapezoid])
def test_second_order_rules_gain_four_from_every_doubling(rule):
    errors = [
        abs(integrate(rule(n if rule is midpoint else n + 1), math.exp) - (math.e - 1))
        for n in (8, 16, 32)
    ]
    assert errors[0] / errors[1] == pytest.approx(4, rel=0.05)
    assert errors[1] / errors[2] == pytest.approx(4, rel=0.05)


def test_geometric_weights_are_the_cells_down_to_the_next_node():
    rule = geometric(0.5, 3)
    assert rule.nodes == (1.0, 0.5, 0.25)
    assert rule.weights == (0.5, 0.25, 0.25)  # the last cell reaches 0


def test_trapezoid_and_midpoint_nodes():
    assert trapezoid(3).nodes == (0.0, 0.5, 1.0)
    assert trapezoid(3).weights == (0.25, 0.5, 0.25)
    assert midpoint(2).nodes == (0.25, 0.75)


def test_captums_names():
    assert by_name("gausslegendre", 3).nodes == gauss_legendre(3).nodes
    assert by_name("riemann_middle", 3).nodes == midpoint(3).nodes
    assert by_name("riemann_trapezoid", 3).nodes == trapezoid(3).nodes
    assert by_name("riemann_left", 4).nodes == (0.0, 0.25, 0.5, 0.75)
    assert by_name("riemann_right", 4).nodes == (0.25, 0.5, 0.75, 1.0)


@pytest.mark.parametrize(
    ("name", "nodes"),
    [("gauss_legendre", 4), ("midpoint", 4), ("riemann_left", 4), ("riemann_right", 4),
     ("trapezoid", 5), ("geometric", 30)],
)  # fmt: skip
def test_the_number_of_nodes_that_a_name_alone_stands_for(name, nodes):
    assert len(by_name(name)) == nodes


def test_an_int_a_name_and_a_rule_are_all_rules():
    assert as_quadrature(5) == as_quadrature(np.int64(5)) == gauss_legendre(5)
    assert as_quadrature("trapezoid").name.startswith("trapezoid")
    rule = Quadrature("mine", (0.5,), (1.0,))
    assert as_quadrature(rule) is rule


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: gauss_legendre(0), ">= 1"),
        (lambda: gauss_legendre(2.5), "integer"),
        (lambda: gauss_legendre(True), "integer"),
        (lambda: trapezoid(1), ">= 2"),
        (lambda: geometric(1.0, 3), "between 0 and 1"),
        (lambda: geometric(0.0, 3), "between 0 and 1"),
        (lambda: by_name("simpson"), "simpson.*known.*gauss_legendre"),
        (lambda: Quadrature("q", (0.5, 0.7), (1.0,)), "as many weights as nodes"),
        (lambda: Quadrature("q", (), ()), "at least one"),
        (lambda: Quadrature("q", (1.5,), (1.0,)), r"outside \[0, 1\]"),
        (lambda: Quadrature("q", (math.nan,), (1.0,)), r"outside \[0, 1\]"),
        (lambda: Quadrature("q", (0.5, 0.7), (1.0, math.nan)), "no finite numbers"),
        (lambda: as_quadrature(None), "integer"),
    ],
)
def test_what_is_no_rule(make, message):
    with pytest.raises(singe.OptionError, match=message):
        make()
