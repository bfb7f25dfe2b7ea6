"""What the reconstruction method refuses, before anything is trained."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from nni_prune_ext.errors import ConfigError, ModelError
from nni_prune_ext.graph.feature_maps import ChannelSources, FeatureMap
from nni_prune_ext.methods.base import Batch
from nni_prune_ext.methods.feature_reading import FeatureReading
from nni_prune_ext.methods.reconstruction import RECONSTRUCTION
from nni_prune_ext.pipeline import prune
from nni_prune_ext.testing.method_bench import Bench, BenchNet

SHORT: dict[str, object] = {"decoder_epochs": 1, "rounds": 2, "round_epochs": 1}


class TestBadInput:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"feature_maps": "stem, wole"}, "'wole' is no module of BenchNet .* Did you mean 'whole'"),
            ({"feature_maps": "head"}, "'head' is no module of BenchNet whose output is a feature map"),
            ({"rounds": 0}, "'rounds' of method 'reconstruction' is 0"),
            ({"hint_share": 1.5}, "'hint_share' of method 'reconstruction' is 1.5"),
        ],
    )
    def test_is_refused_before_anything_is_trained(self, options: dict[str, object], message: str) -> None:
        bench, modes = Bench.of(RECONSTRUCTION, {**SHORT, **options}), []

        def noted(model: nn.Module, batch: Batch) -> Tensor:
            modes.append(model.training)
            return functional.cross_entropy(model(batch[0]), batch[1])

        with pytest.raises(ConfigError, match=message):
            prune(bench.model, bench.example, method=RECONSTRUCTION, target="macs=0.6", options=bench.options,
                  train_batches=bench.batches, loss=noted)  # fmt: skip
        assert not any(modes), "it was looked at, but not trained"

    def test_a_network_that_reads_no_image_is_refused(self) -> None:
        model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 2))
        batches = [(torch.randn(4, 8), torch.tensor([0, 1, 0, 1]))]

        with pytest.raises(ModelError, match="Sequential was run on no image"):
            prune(model, batches[0][0], method=RECONSTRUCTION, target="macs=0.6", options=SHORT, train_batches=batches)

    def test_a_loss_that_does_not_run_the_network_is_refused(self) -> None:
        bench = Bench.of(RECONSTRUCTION, SHORT)

        def of_a_part(model: nn.Module, batch: Batch) -> Tensor:
            return model.get_submodule("stem")(batch[0]).square().mean()  # type: ignore[no-any-return]

        with pytest.raises(ModelError, match="BenchNet was run on no image, .* Let the loss call model"):
            prune(bench.model, bench.example, method=RECONSTRUCTION, target="macs=0.6", options=SHORT,
                  train_batches=bench.batches, loss=of_a_part)  # fmt: skip

    def test_a_forward_pass_of_a_part_is_named(self) -> None:
        model = BenchNet()
        reading = FeatureReading(
            (FeatureMap("", 3, 8, 8), FeatureMap("whole", 8, 8, 8)), {"whole": ChannelSources({}, {})}
        )
        reading.attach(model)

        with pytest.raises(ConfigError, match="did not run 'whole' on an image, expected one forward pass"):
            reading.take()
        model(torch.randn(2, 3, 8, 8))
        reading.take()
        with pytest.raises(ConfigError, match="did not run 'whole'"):
            reading.take()
