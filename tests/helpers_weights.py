"""Scores of single weights, by either engine."""

from __future__ import annotations

from helpers import CPU, assert_close, run_engine

import singe
from singe.data import first_batch
from singe.weight_groups import find_weight_groups

FLOAT64 = 1e-9


def weights_of(model, batches, **options):
    return run_engine(model, batches, granularity="weight", **options)


def score(model, batches, **options):
    return singe.score(model, batches, granularity="weight", progress=False, **options)


def assert_engines_agree(model, batches, graph=None, **options):
    graph = graph or find_weight_groups(model, first_batch(batches, CPU))
    fused = weights_of(model, batches, graph=graph, **options).scores
    naive = weights_of(model, batches, graph=graph, engine="naive", **options).scores
    assert_close(fused, naive, FLOAT64)
    return fused
