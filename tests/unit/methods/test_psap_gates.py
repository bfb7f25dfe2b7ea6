"""What a closed channel is to the network while PSAP (re-derived from the abstract) trains it."""

from __future__ import annotations

import copy

import pytest
import torch
from psap_bench import Spy, driven, nothing
from torch import Tensor, nn
from torch.nn import functional

from nni_prune_ext.errors import ConfigError
from nni_prune_ext.masked_weights import gate_consumers
from nni_prune_ext.methods.base import MethodContext, Phase
from nni_prune_ext.methods.psap import PSAP
from nni_prune_ext.methods.psap_options import PsapOptions
from nni_prune_ext.plan import plan_from_channels
from nni_prune_ext.surgery import Removal, silence_channels
from nni_prune_ext.testing.method_bench import Bench, BenchNet
from nni_prune_ext.training import TrainingSettings, drive


class TestGates:
    def test_the_masked_network_is_the_compact_one_at_the_removal(self) -> None:
        seen: list[tuple[Tensor, Tensor]] = []
        images = torch.randn(16, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(3))

        def compare(spy: Spy, context: MethodContext) -> None:
            compact = copy.deepcopy(context.model).double().eval()
            seen.append((masked[-1], compact(images)))

        masked: list[Tensor] = []

        class Masked(Spy):
            def after_epoch(self, context: MethodContext, phase: Phase, epoch: int) -> None:
                self._context = context
                super().after_epoch(context, phase, epoch)

        run = Bench.of(PSAP, {}).run()
        spy = Masked(PsapOptions(epochs=3, probe_batches=1), nothing, compare)
        apply = run.apply

        def applied(plan: object) -> Removal:
            own, gates = copy.deepcopy(run.model).double().eval(), spy._gates(run)
            for module in own.modules():
                module._forward_pre_hooks.clear()
                module._forward_hooks.clear()
            gate_consumers(own, run.groups, lambda: gates, learn_closed=True)
            masked.append(own(images))
            return apply(plan)  # type: ignore[arg-type]

        run.apply = applied  # type: ignore[method-assign]
        drive(spy, run)

        assert 1 == len(seen)
        scale = float(seen[0][0].abs().max())
        assert 1e-12 > float((seen[0][0] - seen[0][1]).abs().max()) / scale

    def test_weights_that_read_a_closed_channel_learn_as_if_it_were_open(self) -> None:
        torch.manual_seed(0)
        model = BenchNet().double()
        groups = Bench.of(PSAP, {}).groups
        x, labels = torch.randn(4, 3, 8, 8).double(), torch.tensor([0, 1, 2, 3])
        gates = torch.ones(groups.num_channels + 1)
        gates[:4] = 0
        closed = gates[:-1] == 0
        plan = plan_from_channels(groups, {groups.groups[0].name: closed[: groups.groups[0].num_channels].numpy()})
        silent = silence_channels(model, plan, x[:2], groups=groups).train()
        functional.cross_entropy(silent(x), labels).backward()

        found = gate_consumers(model, groups, lambda: gates, learn_closed=True)
        functional.cross_entropy(model.train()(x), labels).backward()
        for handle in found.handles:
            handle.remove()

        expected = dict(silent.named_parameters())
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None
            assert torch.allclose(expected[name].grad, parameter.grad, atol=1e-12), name  # type: ignore[arg-type]
        assert float(model.inside[0].weight.grad[:, :4].abs().sum()) > 0  # type: ignore[index]

    def test_a_weight_that_another_module_uses_past_its_gate_is_named(self) -> None:
        class Past(BenchNet):
            def forward(self, images: Tensor) -> Tensor:
                x = self.stem(images)
                x = x + self.back[2](self.back[1](functional.conv2d(self.inside(x), self.back[0].weight, padding=1)))
                logits: Tensor = self.head(self.whole(self.depthwise(x)).mean((2, 3)))
                return logits

        run = Bench.of(PSAP, {}).run()
        run.model = Past()

        with pytest.raises(ConfigError, match="'back.0.weight' was never read through its mask"):
            drive(Spy(PsapOptions(epochs=2, probe_batches=1), nothing, nothing), run)

    def test_nothing_is_added_but_hooks_that_read_weights(self) -> None:
        before = {name for name, _ in BenchNet().named_parameters()}

        def check(spy: Spy, context: MethodContext) -> None:
            assert before == {name for name, _ in context.model.named_parameters()}
            readers = {m.tensor.rpartition(".")[0] for g in context.groups for m in g.members if m.reads}
            hooked = {n for n, m in context.model.named_modules() if m._forward_hooks or m._forward_pre_hooks}
            assert hooked == (readers if spy.closed and spy.options.mode != "zeroise" else set())
            assert not any(m._backward_hooks or m._backward_pre_hooks for m in context.model.modules())
            for name in hooked:  # a reader's hook sees no activation: the input is handed on as it is
                module = context.model.get_submodule(name)
                x = torch.randn(1, *_input_of(module))
                assert all(hook(module, (x,)) is None for hook in module._forward_pre_hooks.values())
                module.__dict__.pop("weight", None)

        for mode in ("gate", "straight_through", "zeroise"):
            driven({"mode": mode}, seen=check)

    @pytest.mark.parametrize("mode", ["gate", "straight_through"])
    def test_weights_of_closed_channels_rest_or_their_readers_learn(self, mode: str) -> None:
        seen: list[tuple[Tensor, Tensor, Tensor]] = []

        def look(spy: Spy, context: MethodContext) -> None:
            if spy.closed:
                gone = spy.closed["inside.0"].clone()
                writer, reader = (context.model.get_submodule(name).weight for name in ("inside.0", "back.0"))
                seen.append((gone, writer.detach().clone(), reader.detach().clone()))

        driven(
            {"mode": mode, "protect": "none", "schedule": "one_shot", "criterion": "random"}, seen=look,
            settings=TrainingSettings(learning_rate=0.05, weight_decay=0.0, momentum=0.0),
        )  # fmt: skip

        (gone, writer, reader), (_, writer_later, reader_later) = seen[:2]
        assert torch.equal(writer[gone], writer_later[gone]), "what writes a closed channel gets no gradient"
        assert torch.equal(reader[:, gone], reader_later[:, gone]) == (mode == "gate")
        assert not torch.equal(reader[:, ~gone], reader_later[:, ~gone])

    @pytest.mark.parametrize("mode", ["gate", "straight_through"])
    def test_a_channel_closed_behind_a_gate_is_not_brought_back_by_its_gradient(self, mode: str) -> None:
        options = {"mode": mode, "schedule": "one_shot", "probe_deviations": 0.0, "shield_steps": 9}

        _, run = driven({"epochs": 6, **options})

        assert run.notes[0]["protected"] > 0
        assert [0] * 3 == [note["protected"] for note in run.notes[1:4]], "all candidates were closed before"

    def test_zeroised_filters_are_zero_after_a_step_and_train_on(self) -> None:
        zero: list[float] = []

        def look(spy: Spy, context: MethodContext) -> None:
            if spy.closed:
                weight = context.model.get_submodule("inside.0").weight
                zero.append(float(weight[spy.closed["inside.0"]].detach().abs().sum()))

        moved: list[float] = []

        class Looks(Spy):
            def after_step(self, context: MethodContext) -> None:
                if self.closed and bool(self.closed["inside.0"].any()):
                    weight = context.model.get_submodule("inside.0").weight
                    moved.append(float(weight[self.closed["inside.0"]].detach().abs().sum()))

        run = Bench.of(PSAP, {}).run()
        drive(Looks(PsapOptions(epochs=4, mode="zeroise", protect="none"), look, nothing), run)

        assert zero
        assert [0.0] * len(zero) == zero
        assert max(moved) > 0


def _input_of(module: nn.Module) -> tuple[int, ...]:
    return (module.in_features,) if isinstance(module, nn.Linear) else (module.in_channels, 8, 8)  # type: ignore[union-attr,return-value]
