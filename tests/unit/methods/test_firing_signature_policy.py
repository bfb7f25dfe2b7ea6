"""The firing signature as a ratio policy of static methods: what it sees, once, and what becomes of it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from nni_prune_ext.checkpoints import Checkpoints
from nni_prune_ext.errors import ConfigError
from nni_prune_ext.graph.channel_groups import trace_channel_groups
from nni_prune_ext.methods.base import MethodSpec
from nni_prune_ext.methods.baselines import L1
from nni_prune_ext.methods.ftwt_ratios import FiringSignature, ftwt_ratio
from nni_prune_ext.methods.psap import PSAP
from nni_prune_ext.pipeline import PruneResult, prune
from nni_prune_ext.schedules import build_ratio_policy, informed_ratio_policy, needs_data
from nni_prune_ext.testing import check_method
from nni_prune_ext.testing.method_bench import Bench, Interrupted, StoppingCheckpoints
from nni_prune_ext.training import drive
from nni_prune_ext.training.method_run import MethodRun

EXAMPLE = torch.ones(1, 1, 4, 4)
BATCHES = [(torch.ones(8, 1, 4, 4), torch.zeros(8, dtype=torch.int64)) for _ in range(3)]
SIGNATURE = {"first": 31 / 40, "second": 22 / 40, "third": 4 / 40}
POLICY = {"ratio_policy": "firing_signature"}


class Chain(nn.Module):
    """Three groups of 40 channels, of which 10, 20 and 40 are equally hot: 9, 18 and 36 hold nine tenths."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(1, 40, 1, bias=False), nn.Conv2d(40, 40, 1, bias=False)
        self.third, self.head = nn.Conv2d(40, 40, 1, bias=False), nn.Linear(40, 2)
        for layer, hot in ((self.first, 10), (self.second, 20), (self.third, 40)):
            nn.init.constant_(layer.weight, 1e-4)
            nn.init.constant_(layer.weight[:hot], 1.0)

    def forward(self, x: Tensor) -> Tensor:
        for layer in (self.first, self.second, self.third):
            x = torch.relu(layer(x))
        logits: Tensor = self.head(x.mean((2, 3)))
        return logits


def removed_shares(result: PruneResult) -> dict[str, float]:
    return {name: len(channels) / 40 for name, channels in result.plan.removed.items()}


@pytest.fixture
def looks(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Returns the number of channels in the network at every look."""
    seen: list[int] = []
    look = FiringSignature.look

    def noted(self: FiringSignature, context: MethodRun) -> Mapping[str, float]:
        seen.append(context.groups.num_channels)
        return look(self, context)

    monkeypatch.setattr(FiringSignature, "look", noted)
    return seen


def test_a_look_sees_the_share_of_channels_that_images_do_not_need() -> None:
    model = Chain()
    run = MethodRun(model, BATCHES, example_inputs=EXAMPLE, groups=trace_channel_groups(model, EXAMPLE))

    assert pytest.approx(SIGNATURE) == FiringSignature().look(run)


@pytest.mark.parametrize("method", ["l1", "taylor"])
def test_a_static_method_prunes_in_proportion_to_the_signature(method: str) -> None:
    result, uniform = (
        prune(Chain(), EXAMPLE, method=method, target="ratio=0.19", train_batches=BATCHES, options=options)
        for options in (POLICY, {"ratio_policy": "uniform_ratio"})
    )

    # 0.19 of 120 channels are 22.8, the signatures add up to 57 channels: a factor of 0.4
    expected = {name: 0.4 * share for name, share in SIGNATURE.items()}
    assert expected == pytest.approx(removed_shares(result), abs=1 / 40)
    assert dict.fromkeys(SIGNATURE, 0.19) == pytest.approx(removed_shares(uniform), abs=1 / 40)


def test_it_looks_once_at_the_whole_network_however_many_steps_there_are(looks: list[int]) -> None:
    options = {**POLICY, "steps": 3, "schedule": "linear"}

    result = prune(Chain(), EXAMPLE, target="ratio=0.19", train_batches=BATCHES, options=options)

    assert [120] == looks
    assert {n: 0.4 * share for n, share in SIGNATURE.items()} == pytest.approx(removed_shares(result), abs=2 / 40)


def test_a_run_that_is_continued_does_not_look_again_and_ends_alike(looks: list[int], tmp_path: Path) -> None:
    bench = Bench.of(L1, {**POLICY, "steps": 3, "epochs_per_step": 1})
    straight = drive(bench.built(), bench.run())
    with pytest.raises(Interrupted):
        drive(bench.built(), bench.run(checkpoints=StoppingCheckpoints(tmp_path, stop_at=1)))
    before = len(looks)

    continued = drive(bench.built(), bench.run(checkpoints=Checkpoints(tmp_path, {})))

    assert 2 == before == len(looks)
    assert straight.plan == continued.plan


@pytest.mark.parametrize(
    ("spec", "options"),
    [(L1, {"steps": 2, "schedule": "agp", "epochs_per_step": 1}), (PSAP, {**PSAP.demo_options})],
    ids=["l1", "psap"],
)
def test_methods_with_the_policy_keep_their_promises(spec: MethodSpec, options: dict[str, object]) -> None:
    check_method(spec, options={**options, **POLICY})


def test_psap_looks_before_it_trains_and_keeps_what_it_saw(looks: list[int]) -> None:
    bench = Bench.of(PSAP, {**PSAP.demo_options, **POLICY})
    method = bench.built()

    drive(method, bench.run())

    assert [bench.groups.num_channels] == looks
    assert FiringSignature().look(bench.run()) == method.state_dict()[1]["seen"]


def test_without_data_a_method_with_the_policy_is_refused() -> None:
    with pytest.raises(ConfigError, match="The ratio policy 'firing_signature' of method 'l1' needs training data"):
        prune(Chain(), EXAMPLE, target="ratio=0.2", options=POLICY)


def test_asked_before_it_looked_it_says_what_to_do() -> None:
    with pytest.raises(ConfigError, match="before it has looked at data, expected .* or use ftwt_ratio"):
        build_ratio_policy("firing_signature")({"a": []}, {"a": 0.0}, 0.5)


def test_a_group_that_was_not_there_has_the_ratio_zero_and_all_are_alike_where_all_are_needed() -> None:
    policy = FiringSignature()
    policy.seen = {"a": 0.3, "b": 0.0}

    assert {"a": 0.3, "new": 0.0} == policy({"a": [], "new": []}, {}, 1.0)
    assert {"b": 1.0, "new": 1.0} == policy({"b": [], "new": []}, {}, 1.0)


def test_what_was_seen_before_is_taken_and_policies_without_data_never_look() -> None:
    run = MethodRun(Chain())

    assert {"a": 0.5} == informed_ratio_policy("firing_signature", run, {"a": 0.5})({"a": []}, {}, 1.0)
    assert informed_ratio_policy("ftwt_ratio", run, {}) is ftwt_ratio
    assert needs_data("firing_signature")
    assert not needs_data("ftwt_ratio")
