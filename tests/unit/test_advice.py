"""Which Qwen2 suits which machine."""

from __future__ import annotations

import pytest

from qwen2_local.advice import CONTEXT, advise, here, recommended
from qwen2_local.catalog import CATALOG
from qwen2_local.fit import Memory

PLENTY = 10**13


def on(gigabytes, disk=PLENTY, **more):
    return advise(Memory(int(gigabytes * 1e9), int(gigabytes * 1e9)), disk, **more)


def best(*arguments, **more):
    found = recommended(on(*arguments, **more))
    return found and found.model.name


def verdicts(*arguments, **more):
    return {one.model.name: one.verdict for one in on(*arguments, **more)}


def test_all_ten_in_the_order_of_the_catalog():
    assert [one.model for one in on(16)] == list(CATALOG)


@pytest.mark.parametrize(
    ("gigabytes", "name"), [(0.5, None), (1.4, "0.5b"), (4, "1.5b"), (8, "7b"), (16, "7b"), (32, "7b"), (64, "57b"), (256, "57b")]
)
def test_the_largest_that_fits_and_runs_well_is_recommended(gigabytes, name):
    assert best(gigabytes) == name


def test_at_most_one_is_marked():
    assert [one.model.name for one in on(16) if one.recommended] == ["7b"]
    assert not [one for one in on(0.5) if one.recommended]


def test_72b_is_slow_where_memory_is_slow():
    assert verdicts(128)["72b"] == "slow"
    assert best(128, bandwidth=400e9) == "72b"
    assert verdicts(64)["57b"] == "fits", "only a quarter of it is read for a token"


def test_what_leaves_no_room_and_what_does_not_fit_at_all():
    small = verdicts(6)
    assert small["1.5b"] == "fits" and small["7b"] == "fits" and small["57b"] == "large"
    assert verdicts(5)["7b"] == "tight"


def test_fewer_bits_where_the_usual_ones_do_not_fit():
    assert [one.level for one in on(6.3) if one.model.name == "7b"] == ["q3_k_m"]
    assert [one.level for one in on(16) if one.model.name == "7b"] == ["q4_k_m"]


def test_a_base_model_is_fetched_whole_and_converted():
    instruct, base = (one for one in on(16) if one.model.size.name == "7b")
    assert (instruct.download, instruct.disk, instruct.size) == (4_680_000_000, 4_680_000_000, 4_680_000_000)
    assert base.size == instruct.size and base.download == 2 * base.model.size.weights
    assert base.disk == base.download + base.size


def test_a_disk_that_is_too_small():
    assert verdicts(16, 5_000_000_000)["7b"] == "fits" and verdicts(16, 5_000_000_000)["7b-base"] == "disk"
    assert best(16, 2_000_000_000) == "1.5b"


def test_memory_at_other_contexts():
    seven = next(one for one in on(16) if one.model.name == "7b")
    assert seven.memory_at(CONTEXT) == seven.memory < seven.memory_at(32768)


def test_this_machine():
    assert len(here()) == 10
