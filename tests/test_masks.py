"""Masks as pure functions, each against values worked out by hand."""

import math

import pytest
import torch

from megatron_mopd import masks


def test_segments_name_the_row_and_skip_empty_rows():
    assert masks.segments(torch.tensor([0, 2, 2, 5]), 5).tolist() == [0, 0, 2, 2, 2]
    assert masks.segments(torch.tensor([0, 0]), 0).tolist() == []


@pytest.mark.parametrize("threshold", [1.5, 2.0])
def test_sequences_are_dropped_by_their_mean_ratio_error(threshold):
    # Row 0 agrees; row 1 has errors 2 (as c = 1/2) and 1, mean 1.5: kept at either threshold; row 2 has mean 2.5.
    log_importance = torch.tensor([0.0, -math.log(2), 0.0, math.log(2), -math.log(3)])
    kept = masks.agreeing_sequences(log_importance, torch.tensor([0, 1, 3, 5]), threshold)
    assert kept.tolist() == [True, True, True, False, False]


def test_an_infinite_ratio_drops_its_sequence():
    kept = masks.agreeing_sequences(torch.tensor([float("inf"), 0.0, 0.0]), torch.tensor([0, 2, 3]), 2.0)
    assert kept.tolist() == [False, False, True]
