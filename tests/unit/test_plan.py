"""Plans survive a file, compose, refuse other models, and say what is wrong in four parts."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from nni_prune_ext.errors import NniPruneExtError, OutputError, PlanError, TraceError
from nni_prune_ext.graph.channel_groups import ChannelGroups, trace_channel_groups
from nni_prune_ext.plan import (
    PruningPlan,
    plan_from_channels,
    plan_from_masks,
    plan_to_masks,
    removed_channels,
    spared,
)
from nni_prune_ext.surgery import cut_channels
from nni_prune_ext.testing.toy_models import ZOO


def traced(name: str) -> ChannelGroups:
    torch.manual_seed(0)
    return trace_channel_groups(ZOO[name].build(), ZOO[name].example_inputs())


@pytest.fixture
def chain() -> ChannelGroups:
    return traced("chain")


@pytest.mark.parametrize("name", ["chain", "option_a", "grouped", "dense"])
def test_a_plan_survives_json_and_a_file(name: str, tmp_path: Path) -> None:
    groups = traced(name)
    plan = plan_from_channels(groups, {g.name: [0] for g in groups if g.num_channels > 1})

    plan.save(tmp_path / "plan.json")

    assert plan == PruningPlan.from_json(plan.to_json())
    assert plan == PruningPlan.load(tmp_path / "plan.json")
    assert ["plan.json"] == [path.name for path in tmp_path.iterdir()]


def test_the_same_plan_is_the_same_text(chain: ChannelGroups) -> None:
    one = plan_from_channels(chain, {"0.0": [3, 1, 1], "2.0": np.arange(8) == 5})
    other = plan_from_channels(chain, {"2.0": [5], "0.0": (1, 3)})

    assert {"0.0": (1, 3), "2.0": (5,)} == one.removed
    assert one == other


def test_channels_of_groups_and_removed_channels_are_inverse() -> None:
    for name in ("grouped", "nhwc_flatten", "glu", "dense", "option_a"):
        groups = traced(name)
        random = np.random.default_rng(0)
        gone = {g.name: spared(g, random.random(g.num_channels) < 0.5) for g in groups}

        found = removed_channels(plan_from_channels(groups, gone), groups)

        assert all(np.array_equal(gone[key], found[key]) for key in gone)


def test_a_later_plan_counts_in_the_channels_that_the_first_one_left() -> None:
    model, inputs = ZOO["chain"].build(), ZOO["chain"].example_inputs()
    groups = trace_channel_groups(model, inputs)
    first = plan_from_channels(groups, {"0.0": [0, 3, 7]})
    compact = cut_channels(model, first, inputs, groups=groups).model
    second = plan_from_channels(trace_channel_groups(compact, inputs), {"0.0": [0, 2, 4], "2.0": [1]})

    both = first.then(second)

    assert {"0.0": (0, 1, 3, 4, 6, 7), "2.0": (1,)} == both.removed
    assert (first.widths, first.fingerprint) == (both.widths, both.fingerprint)


def test_two_plans_with_the_same_rewrites_name_them_once() -> None:
    groups = traced("option_a")
    first, second = plan_from_channels(groups, {}), plan_from_channels(groups, {groups.groups[0].name: [0]})

    assert len(groups.rewrites) > 0
    assert groups.rewrites == first.then(second).rewrites


def test_protecting_groups_does_not_make_it_another_model(chain: ChannelGroups) -> None:
    protected = chain.protecting({"2.0": "asked for"})

    plan = plan_from_channels(protected, {"0.0": [1]})

    assert removed_channels(plan, chain)["0.0"].tolist() == [False, True] + [False] * 6


def test_masks_and_plan_say_the_same_both_ways(chain: ChannelGroups) -> None:
    plan = plan_from_channels(chain, {"0.0": [0, 5], "1.0": [2]})

    masks = plan_to_masks(plan)

    assert {"0.0": 6, "1.0": 7, "2.0": 8} == {name: int(mask.sum()) for name, mask in masks.items()}
    assert plan == plan_from_masks(chain, masks)


def test_a_shared_channel_goes_only_if_all_masks_that_cover_it_agree() -> None:
    groups = traced("residual")
    writers = [m.tensor.removesuffix(".weight") for m in groups["0.0"].members if m.role.value == "writer"]
    masks = {name: np.ones(8, dtype=np.bool_) for name in writers}
    for name in writers:
        masks[name][[1, 2]] = False
    masks[writers[-1]][2] = True

    plan = plan_from_masks(groups, masks)
    fewer = plan_from_masks(groups, {writers[0]: masks[writers[0]]})

    assert len(writers) > 1
    assert {"0.0": (1,)} == plan.removed
    assert {"0.0": (1, 2)} == fewer.removed


def test_masks_never_empty_a_layer_and_do_not_touch_protected_ones(chain: ChannelGroups) -> None:
    plan = plan_from_masks(chain, {"0.0": np.zeros(8, dtype=np.bool_), "4": np.zeros(4, dtype=np.bool_)})

    assert {"0.0": tuple(range(1, 8))} == plan.removed


class Joined(nn.Module):
    """Joins two layers and adds a third one: one group with three writers."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1), nn.Conv2d(3, 8, 1)
        self.head = nn.Conv2d(8, 2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.cat([self.a(x), self.b(x)], 1) + self.c(x))


def test_no_layer_of_a_group_may_be_left_without_channels() -> None:
    groups = trace_channel_groups(Joined(), torch.randn(1, 3, 4, 4))
    gone = np.arange(8) < 4

    with pytest.raises(PlanError, match=r"removes all 4 channels of 'a' \(group 'a'\), expected .* Keep more"):
        plan_from_channels(groups, {"a": gone})

    assert {"a": (1, 2, 3)} == plan_from_channels(groups, {"a": spared(groups["a"], gone)}).removed


def _json(plan: PruningPlan, **changes: object) -> str:
    return json.dumps({**json.loads(plan.to_json()), **changes})


def _wrong_plans(plan: PruningPlan) -> dict[str, str]:
    return {
        "not JSON": "channels",
        "not a plan": "[1, 2]",
        "cut off": plan.to_json()[:-20],
        "another format": _json(plan, format=99),
        "unknown field": _json(plan, extra=1),
        "no fingerprint": _json(plan, fingerprint="abc"),
        "unknown width": _json(plan, removed={"nowhere": [1]}),
        "outside": _json(plan, removed={"0.0": [1, 8]}),
        "negative": _json(plan, removed={"0.0": [-1, 2]}),
        "unordered": _json(plan, removed={"0.0": [2, 1]}),
        "twice": _json(plan, removed={"0.0": [1, 1]}),
        "all": _json(plan, removed={"0.0": list(range(8))}),
    }


@pytest.mark.parametrize("case", _wrong_plans(PruningPlan(removed={}, widths={"0.0": 8}, fingerprint="0" * 64)))
def test_a_corrupt_or_foreign_plan_is_refused(case: str, chain: ChannelGroups, tmp_path: Path) -> None:
    text = _wrong_plans(plan_from_channels(chain, {"0.0": [1]}))[case]
    path = tmp_path / "plan.json"
    path.write_text(text)

    with pytest.raises(
        PlanError, match=r"plan\.json' is not a usable pruning plan: .* Expected the JSON .* make a new"
    ):
        PruningPlan.load(path)


def test_errors_name_what_was_wrong_seen_expected_and_what_to_do(chain: ChannelGroups, tmp_path: Path) -> None:
    plan = plan_from_channels(chain, {"0.0": [1]})
    grouped = traced("grouped")
    torn = plan_from_channels(grouped, {"1.0.0": [0]})
    torn = torn.model_copy(update={"removed": {"1.0.0": torn.removed["1.0.0"][:1]}})
    later = plan.model_copy(update={"removed": {}, "widths": {"0.0": 7, "2.0": 5}})
    cases: list[tuple[type[NniPruneExtError], str, object]] = [
        (
            PlanError,
            r"another model: .*fingerprint is .*expected .*Use the model",
            lambda: removed_channels(plan, grouped),
        ),
        (
            PlanError,
            r"removes channel \d+ of '1.0.0' but keeps \d+, expected both",
            lambda: removed_channels(torn, grouped),
        ),
        (
            PlanError,
            r"removes channels of '0.0', which is protected",
            lambda: removed_channels(plan, chain.protecting({"0.0": "asked for"})),
        ),
        (PlanError, r"'2.0' has 5 channels in the later plan, expected the 8 .* Make", lambda: plan.then(later)),
        (
            PlanError,
            r"removes all 8 channels of '0.0'.*expected at least one.*Keep",
            lambda: plan_from_channels(chain, {"0.0": range(8)}),
        ),
        (
            PlanError,
            r"Channel 8 is outside group '0.0', which has 8.*Count from 0",
            lambda: plan_from_channels(chain, {"0.0": [8]}),
        ),
        (
            PlanError,
            r"shape \(3,\), expected \(8,\).*Give one value",
            lambda: plan_from_channels(chain, {"0.0": np.ones(3, dtype=np.bool_)}),
        ),
        (
            PlanError,
            r"mask for '0.0' has shape \(3,\), expected \(8,\)",
            lambda: plan_from_masks(chain, {"0.0": np.ones(3, dtype=np.bool_)}),
        ),
        (
            PlanError,
            r"mask for 'nowhere', expected the name of a layer.*Name layers",
            lambda: plan_from_masks(chain, {"nowhere": np.ones(3, dtype=np.bool_)}),
        ),
        (TraceError, r"no prunable channel group 'nowhere'.*Run", lambda: plan_from_channels(chain, {"nowhere": [0]})),
        (
            OutputError,
            r"Cannot write .*p.json.*Expected a file name.*Choose",
            lambda: plan.save(tmp_path / "no" / "p.json"),
        ),
        (PlanError, r"Cannot read a pruning plan from .*Give the path", lambda: PruningPlan.load(tmp_path / "no.json")),
    ]
    for error, words, act in cases:
        with pytest.raises(error) as caught:
            act()
        assert re.search(words, str(caught.value)), str(caught.value)


def test_widths_are_those_of_the_output_dimension_of_a_layer_that_reads_its_own_group() -> None:
    class Looped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.grouped = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1, groups=2)
            self.mix, self.head = nn.Conv2d(3, 16, 1), nn.Conv2d(16, 2, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.stem(x)
            return self.head(torch.cat([y, self.grouped(y)], 1) + self.mix(x))

    groups = trace_channel_groups(Looped(), torch.randn(1, 3, 4, 4))

    assert {"stem": 8, "grouped": 8} == plan_from_channels(groups, {}).widths
