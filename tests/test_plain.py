"""Numbers as users have them: NumPy's and tensors of one element serve like Python's own."""

from __future__ import annotations

import json
import math
import re

import numpy as np
import pytest
import torch
from helpers import one_thread  # noqa: F401 - autouse
from helpers_budget import random_scores
from helpers_networks import CASES
from hypothesis import given
from hypothesis import strategies as st

import singe
from singe.plain import NOT_NEGATIVE, POSITIVE, plain_count, plain_number

CASE = CASES["residual"]
NUMBER = st.floats(allow_nan=False, allow_infinity=False, width=32)
KINDS = (float, np.float64, torch.float64)
NARROW = (np.float32, np.float16, torch.float32, torch.float16)


def as_kind(value: float, kind):
    return torch.tensor(value, dtype=kind) if isinstance(kind, torch.dtype) else kind(value)


@given(NUMBER, NUMBER, NUMBER, st.sampled_from("(["), st.sampled_from(")]"), st.sampled_from(KINDS))
def test_an_interval_is_what_mathematics_takes_it_for(value, low, high, left, right, kind):
    inside = (
        low <= value <= high and (value > low or left == "[") and (value < high or right == "]")
    )
    within = f"{left}{low}, {high}{right}"
    if not inside:
        with pytest.raises(singe.OptionError, match=r"^x must lie in [\[(]"):
            plain_number("x", as_kind(value, kind), within)
        return
    found = plain_number("x", as_kind(value, kind), within)
    assert type(found) is float
    assert found == value


@given(st.integers(0, 999), st.sampled_from(NARROW))
def test_a_decimal_is_itself_whatever_holds_it(thousandths, kind):
    """0.29 in float32 is 0.28999999165534973: one of 100 units less would go."""
    assert plain_number("x", as_kind(thousandths / 1000, kind), "[0, 1)") == thousandths / 1000


NO_NUMBERS = {
    "a str": "0.5", "a bytes": b"0.5", "a bool": True, "None": None, "a list": [0.5], "nan": math.nan,
    "a complex": 1j, "a complex64": np.complex64(0.5), "a Tensor": torch.ones(2), "ndarray": np.array("0.5"),
    "tensor(True), a Tensor": torch.tensor(True), "device='meta'": torch.ones((), device="meta"),
    "0000": 10**400,
}  # fmt: skip


@pytest.mark.parametrize("told", NO_NUMBERS)
def test_what_is_no_number(told):
    with pytest.raises(
        singe.OptionError, match=r"^x must lie in \[0, 1\]: a share, got .*" + re.escape(told)
    ):
        plain_number("x", NO_NUMBERS[told], "[0, 1]", "a share")
    with pytest.raises(singe.OptionError, match=r"^x must be a whole number >= 2, got "):
        plain_count("x", NO_NUMBERS[told] if told != "0000" else 1, 2)


def test_open_ended_intervals_have_words():
    for value in (0, math.inf):
        with pytest.raises(singe.OptionError, match=r"^x must be positive and finite, got "):
            plain_number("x", value, POSITIVE)
    assert plain_number("x", 0, NOT_NEGATIVE) == 0.0
    with pytest.raises(singe.OptionError, match=r"^x must be finite and not negative, got -1"):
        plain_number("x", -1, NOT_NEGATIVE)


@pytest.mark.parametrize("kind", [int, np.int64, np.uint8, torch.tensor], ids=lambda k: k.__name__)
def test_counts(kind):
    found = plain_count("n", kind(3), 1)
    assert type(found) is int
    assert found == 3
    with pytest.raises(singe.OptionError, match=r"^n must be a whole number >= 4, got "):
        plain_count("n", kind(3), 4)


def test_a_run_takes_them_and_writes_plain_ones(tmp_path):
    def run(count, number, folder):
        options = {
            "rounds": count(2), "finetune_steps": count(1), "final_steps": count(1), "seed": count(3),
            "checkpoint_every": count(1), "round_to": count(1), "macs": number(0.7), "lr": number(0.1),
            "max_pruning_ratio": number(0.6), "clip_grad_norm": number(0.7), "ema": number(0.9),
            "label_smoothing": number(0.1), "distill": number(0.3), "temperature": number(4.1),
            "accuracy_floor": number(0.0), "max_memory": count(2**26),
        }  # fmt: skip
        model = CASE.model(dtype=torch.float32)
        batches = CASE.batches(dtype=torch.float32)
        report = singe.compress(
            model, train=batches, evaluate=batches, progress=False, checkpoint=folder, resume=True,
            **options,
        )  # fmt: skip
        json.dumps(report.to_dict())
        return report, model.state_dict()

    plain, weights = run(int, float, tmp_path / "plain")
    for i, (count, number) in enumerate([(np.int32, np.float32), (torch.tensor, torch.tensor)]):
        report, others = run(count, number, tmp_path / str(i))
        assert report.plan == plain.plan
        assert all(torch.equal(others[name], value) for name, value in weights.items())
        resumed, _ = run(count, number, tmp_path / "plain")  # it is the same run
        assert resumed.to_dict() == plain.to_dict()


def test_a_plan_takes_them():
    model, x = CASE.model(), CASE.batches()[0][0]
    scores = random_scores(model, x)
    plain = singe.plan(model, scores, x, macs=0.75, max_pruning_ratio=0.5, round_to=2)
    same = singe.plan(
        model, scores, x, macs=torch.tensor(0.75), max_pruning_ratio=np.float32(0.5), round_to=np.int8(2)
    )  # fmt: skip
    assert same == plain
    assert same.to_json() == plain.to_json()


def test_a_timing_has_a_say_under_a_latency_only():
    model, x = CASE.model(), CASE.batches()[0][0]
    with pytest.raises(
        singe.OptionError, match=r"timing is how a latency is measured, and .* macs"
    ):
        singe.plan(model, random_scores(model, x), x, macs=0.5, timing=singe.Timing())
    with pytest.raises(singe.OptionError, match=r"timing must be a singe.Timing.*got int"):
        singe.plan(model, random_scores(model, x), x, latency=0.5, timing=3)
    with pytest.raises(
        singe.OptionError, match=r"Timing: runs must be a whole number >= 1, got 0.5"
    ):
        singe.Timing(runs=0.5)
    with pytest.raises(
        singe.OptionError, match=r"Timing: warmup must be a whole number >= 0, got None"
    ):
        singe.Timing(warmup=None)
    assert singe.Timing(batch_size=np.int64(4)).batch_size == 4
