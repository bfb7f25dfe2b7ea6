"""A resumed search reads its state by name: layers whose names sort differently from their order."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from nni_prune_ext.allocation import Target
from nni_prune_ext.certificate import verify_groups
from nni_prune_ext.checkpoints import Checkpoints
from nni_prune_ext.graph.channel_groups import trace_channel_groups
from nni_prune_ext.methods.lottery_jackpots import LotteryJackpots
from nni_prune_ext.methods.lottery_jackpots_options import JackpotOptions
from nni_prune_ext.training import MethodRun, TrainingSettings, drive


class Stopped(Exception):
    pass


class StopAfterOne(LotteryJackpots):
    def after_epoch(self, context, phase, epoch) -> None:
        if epoch == 1:
            raise Stopped
        super().after_epoch(context, phase, epoch)


def network() -> nn.Sequential:
    """Returns layers "0", "3", "6", "9", "12", "15": "12" sorts before "3"."""
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for width, out in ((3, 8), (8, 12), (12, 10), (10, 8), (8, 9), (9, 6)):
        layers += [nn.Conv2d(width, out, 3, padding=1, bias=False), nn.BatchNorm2d(out), nn.ReLU()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(6 * 16, 4))


def run_for(target: Target, checkpoints: Checkpoints | None) -> MethodRun:
    model, generator = network(), torch.Generator().manual_seed(1)
    data: list[tuple[Tensor, Tensor]] = [
        (torch.randn(8, 3, 4, 4, generator=generator), torch.randint(0, 4, (8,), generator=generator)) for _ in range(6)
    ]
    example = data[0][0][:1]
    groups = verify_groups(model, example, trace_channel_groups(model, example))
    return MethodRun(
        model=model, batches_=data, groups=groups, example_inputs=example, targets=(target,),
        settings=TrainingSettings(), checkpoints=checkpoints,
    )  # fmt: skip


@pytest.mark.parametrize("target", [Target("ratio", 0.4), Target("sparsity", 0.7)], ids=str)
def test_a_resumed_search_goes_on_with_every_score_at_its_own_layer(target: Target, tmp_path: Path) -> None:
    options = JackpotOptions(search_epochs=4, tune_epochs=0, learning_rate=0.3, gap=0.001)
    straight = LotteryJackpots(options)
    whole = run_for(target, None)
    expected = drive(straight, whole)
    with pytest.raises(Stopped):
        drive(StopAfterOne(options), run_for(target, Checkpoints(tmp_path, {})))
    resumed = LotteryJackpots(options)
    again = run_for(target, Checkpoints(tmp_path, {}))
    found = drive(resumed, again)

    assert expected.facts["swaps_made"] > 0
    assert expected.plan == found.plan
    assert whole.notes == again.notes
    for name, score in straight.scores.items():
        assert torch.equal(score, resumed.scores[name]), name
        assert torch.equal(straight.masks[name], resumed.masks[name]), name
