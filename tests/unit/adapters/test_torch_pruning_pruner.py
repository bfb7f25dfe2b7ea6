"""The certified pruner: torch-pruning selects, we cut; and the host's defects that this avoids, each shown."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable

import pytest
import torch
import torch_pruning as tp
import torchvision
from torch import Tensor, nn

from nni_prune_ext import silence_channels
from nni_prune_ext.adapters import torch_pruning_groups, torch_pruning_pruner
from nni_prune_ext.certificate import Certificate
from nni_prune_ext.errors import CertificateError, ConfigError, PlanError, TraceError
from nni_prune_ext.graph.randomised import outputs
from nni_prune_ext.testing.method_bench import BenchNet, modes_of, traces_on
from nni_prune_ext.testing.toy_models import ZOO
from nni_prune_ext.torch_pruning import CertifiedPruner, L1Importance, StepReport, agp, linear


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return BenchNet()


@pytest.fixture
def x() -> Tensor:
    return torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class LayerNormNet(nn.Module):
    """A layer norm between two layers, as wide as where torch-pruning loses the order of what it keeps."""

    def __init__(self, width: int = 144) -> None:
        super().__init__()
        self.first, self.norm, self.second = nn.Linear(6, width), nn.LayerNorm(width), nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.second(torch.nn.functional.gelu(self.norm(self.first(x))))
        return result


def pruner_of(model: nn.Module, x: Tensor, **arguments: object) -> CertifiedPruner:
    given = {"ignored_layers": [model.head], **arguments} if isinstance(model, BenchNet) else arguments
    return CertifiedPruner(model, x, L1Importance(model, x), **given)


def widths(model: nn.Module) -> dict[str, int]:
    return {name: m.out_channels for name, m in model.named_modules() if isinstance(m, nn.Conv2d)}


def test_step_prunes_in_place_and_reports_what_it_did(model: nn.Module, x: Tensor) -> None:
    dense, modules = copy.deepcopy(model), dict(model.named_modules())

    report = pruner_of(model, x, pruning_ratio=0.5).step()

    assert widths(model) == {name: before // 2 for name, before in widths(dense).items()}
    assert modules == dict(model.named_modules())
    assert widths(dense) == {change.layer: change.before for change in report.layers}
    assert widths(model) == {change.layer: change.after for change in report.layers}
    assert report.removed == report.requested == sum(widths(model).values())
    assert [sum(p.numel() for p in m.parameters()) for m in (dense, model)] == [
        report.params_before,
        report.params_after,
    ]
    assert isinstance(report.certificate, Certificate)
    assert report.certificate.exact
    assert report.removal is not None
    assert report.removal.model is model
    assert {"head": "is in ignored_layers"} == report.skipped
    assert "certificate exact: True" in str(report)
    assert "inside.0: 16 -> 8" in str(report)


def test_pruned_model_computes_what_the_full_one_computes_with_these_channels_silenced(
    model: nn.Module, x: Tensor
) -> None:
    model.eval()
    dense = copy.deepcopy(model.double())

    report = pruner_of(model, x.double(), pruning_ratio=0.5).step()

    assert report.removal is not None
    silent = silence_channels(dense, report.removal.plan, x.double())
    assert 1e-12 > (model(x.double()) - silent(x.double())).abs().max()


@pytest.mark.parametrize("schedule", [linear, agp])
def test_three_steps_end_where_one_step_ends_in_widths(
    schedule: Callable[[float, int], list[float]], model: nn.Module, x: Tensor
) -> None:
    other = copy.deepcopy(model)
    pruner = pruner_of(model, x, pruning_ratio=0.5, iterative_steps=3, iterative_pruning_ratio_scheduler=schedule)

    reports = [pruner.step() for _ in range(3)]
    pruner_of(other, x, pruning_ratio=0.5).step()

    assert [1, 2, 3] == [report.step for report in reports]
    assert all(report.certificate is None or report.certificate.exact for report in reports)
    assert reports[0].removed > 0
    assert widths(other) == widths(model)
    assert reports[0].params_after == reports[1].params_before


def test_global_pruning_and_ratios_per_layer_are_torch_prunings_own(model: nn.Module, x: Tensor) -> None:
    for arguments in (
        {"global_pruning": True, "pruning_ratio": 0.4},
        {"pruning_ratio_dict": {"inside.0": 0.75}, "pruning_ratio": 0.25},
        {"round_to": 4, "pruning_ratio": 0.3},
    ):
        ours, theirs = copy.deepcopy(model), copy.deepcopy(model)
        results = []
        for net, cls, example in ((ours, CertifiedPruner, x), (theirs, tp.pruner.BasePruner, (x,))):
            given = dict(arguments)
            if "pruning_ratio_dict" in given:
                given["pruning_ratio_dict"] = {
                    net.get_submodule(k): v for k, v in arguments["pruning_ratio_dict"].items()
                }
            fresh = (
                {} if cls is CertifiedPruner else {"in_channel_groups": {}, "out_channel_groups": {}, "num_heads": {}}
            )
            cls(net, example, L1Importance(net, x), ignored_layers=[net.head], **fresh, **given).step()
            results.append(net.state_dict())
        assert [] == [key for key, value in results[1].items() if not torch.equal(value, results[0][key])], arguments


def test_foreign_importance_works_as_well(model: nn.Module, x: Tensor) -> None:
    report = CertifiedPruner(
        model, x, tp.importance.MagnitudeImportance(p=2), pruning_ratio=0.5, ignored_layers=[model.head]
    ).step()

    assert report.removed == report.requested > 0
    assert report.certificate is not None
    assert report.certificate.exact


def test_nothing_pruned_is_said_with_reasons(model: nn.Module, x: Tensor) -> None:
    before = model.stem[0].weight
    pruner = pruner_of(model, x, pruning_ratio=0.0)

    report = pruner.step()

    assert str(report).startswith("step 1: nothing was pruned")
    assert report.removal is report.certificate is None
    assert 0 == report.removed == report.requested
    assert report.params_before == report.params_after
    assert "the ratio of this step is reached" in report.skipped["stem.0"]
    assert before is model.stem[0].weight
    with pytest.warns(UserWarning, match="exceed"):
        assert "all 1 steps were made before" == pruner.step().skipped["stem.0"]


def test_output_layer_that_was_not_ignored_stays_and_is_reported(model: nn.Module, x: Tensor) -> None:
    for importance in (L1Importance(model, x), tp.importance.MagnitudeImportance(p=1)):
        report = CertifiedPruner(model, x, importance, pruning_ratio=0.25).step()

        assert (4, 4) == (model.head.out_features, model(x).shape[1])
        assert "output" in report.skipped["head"]
        assert report.removed > 0


def test_layer_coupled_to_an_ignored_parameter_stays_and_is_reported(model: nn.Module, x: Tensor) -> None:
    report = CertifiedPruner(
        model, x, L1Importance(model, x), ignored_layers=[model.head, model.inside[1].weight], pruning_ratio=0.5
    ).step()

    assert 16 == model.inside[0].out_channels
    assert 6 == model.stem[0].out_channels
    assert "inside.0" in report.skipped


def test_optimizer_follows_with_its_state(model: nn.Module, x: Tensor) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model(x).square().sum().backward()
    optimizer.step()
    momentum = optimizer.state[model.head.weight]["momentum_buffer"].clone()
    pruner = pruner_of(model, x, pruning_ratio=0.5, optimizer=optimizer)

    report = pruner.step()
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}

    assert report.removal is not None
    assert {id(p) for p in model.parameters()} == held
    kept = report.removal.kept["head.weight"][1]
    assert torch.equal(momentum[:, kept], optimizer.state[model.head.weight]["momentum_buffer"])
    optimizer.zero_grad()
    before = model.head.weight.detach().clone()
    model(x).square().sum().backward()
    optimizer.step()
    assert not torch.equal(before, model.head.weight)


def test_modes_gradients_freezing_and_memory_format_are_kept(model: nn.Module, x: Tensor) -> None:
    model = model.to(memory_format=torch.channels_last).train()
    model.stem.eval()
    model.back.requires_grad_(False)
    model.head.weight.grad = torch.ones_like(model.head.weight)
    modes, state = modes_of(model), {key: value.clone() for key, value in model.state_dict().items()}

    pruner = pruner_of(model, x, pruning_ratio=0.5)

    assert modes == modes_of(model)
    assert [] == [key for key, value in model.state_dict().items() if not torch.equal(value, state[key])]
    assert model.head.weight.grad is not None
    assert ["back.0.weight", "back.1.bias", "back.1.weight"] == sorted(
        name for name, p in model.named_parameters() if not p.requires_grad
    )

    pruner.step()

    assert modes == modes_of(model)
    assert [] == traces_on(model)
    assert model.stem[0].weight.is_contiguous(memory_format=torch.channels_last)
    assert ["back.0.weight", "back.1.bias", "back.1.weight"] == sorted(
        name for name, p in model.named_parameters() if not p.requires_grad
    )


def test_refused_cut_leaves_model_and_step_count(model: nn.Module, x: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> object:
        raise CertificateError("not exact")

    pruner = pruner_of(model, x, pruning_ratio=0.5)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    with monkeypatch.context() as patch:
        patch.setattr(torch_pruning_pruner, "remove_channels", refuse)
        with pytest.raises(CertificateError):
            pruner.step()

    assert 0 == pruner.current_step
    assert [] == [key for key, value in model.state_dict().items() if not torch.equal(value, state[key])]
    assert pruner.step().removed > 0


# defects of torch-pruning 1.6 that the face avoids; each is shown first, so that a new version is noticed


def test_types_in_ignored_layers_are_refused_where_torch_pruning_passes_over_them(model: nn.Module, x: Tensor) -> None:
    theirs = copy.deepcopy(model)
    tp.pruner.BasePruner(
        theirs, (x,), tp.importance.MagnitudeImportance(), ignored_layers=[nn.Linear], pruning_ratio=0.5,
        in_channel_groups={}, out_channel_groups={}, num_heads={},
    ).step()  # fmt: skip
    assert 2 == theirs.head.out_features

    with pytest.raises(ConfigError, match="ignored_layers holds the type Linear, expected layers or parameters"):
        CertifiedPruner(model, x, L1Importance(model, x), ignored_layers=[nn.Linear])


def test_dicts_are_not_shared_between_pruners_where_torch_prunings_defaults_are() -> None:
    example = ZOO["grouped"].example_inputs()
    theirs, ours = ZOO["grouped"].build(), ZOO["grouped"].build()
    first = tp.pruner.BasePruner(theirs, (example,), tp.importance.MagnitudeImportance())
    second = tp.pruner.BasePruner(nn.Sequential(nn.Conv2d(3, 4, 1)), (example,), tp.importance.MagnitudeImportance())
    assert first.out_channel_groups is second.out_channel_groups
    first.out_channel_groups.clear()
    first.in_channel_groups.clear()

    pruner = CertifiedPruner(ours, example, L1Importance(ours, example))
    assert pruner.out_channel_groups
    assert not second.out_channel_groups
    gone = weakref.ref(ours)
    del pruner, ours
    gc.collect()
    assert gone() is None


def test_given_dicts_are_not_changed(model: nn.Module, x: Tensor) -> None:
    given: dict[nn.Module, int] = {}
    unwrapped: list[object] = []

    pruner_of(model, x, out_channel_groups=given, unwrapped_parameters=unwrapped).step()

    assert {} == given
    assert [] == unwrapped


def test_one_image_is_traced_with_its_batch_where_torch_pruning_unpacks_it() -> None:
    seen: list[int] = []
    net = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 2, 1))
    net[0].register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].dim()))
    one = torch.randn(1, 3, 8, 8)
    tp.DependencyGraph().build_dependency(net, one)
    assert [3] == seen

    seen.clear()
    net.train()
    pruner = CertifiedPruner(net, one, tp.importance.MagnitudeImportance())

    assert {4} == set(seen)
    assert net.training
    assert 4 == pruner.step().removed


def test_evaluation_mode_does_not_stay_where_torch_pruning_leaves_it(model: nn.Module, x: Tensor) -> None:
    theirs = copy.deepcopy(model).train()
    tp.DependencyGraph().build_dependency(theirs, (x,))
    assert not theirs.training

    model.train()
    pruner_of(model, x).step()

    assert model.training


def test_layer_norm_keeps_its_order_where_torch_pruning_permutes_it() -> None:
    torch.manual_seed(0)
    model, x = LayerNormNet().double().eval(), torch.randn(3, 6).double()
    nn.init.normal_(model.norm.weight)
    theirs, dense = copy.deepcopy(model), copy.deepcopy(model)
    importance = tp.importance.MagnitudeImportance(p=1)

    report = CertifiedPruner(model, x, importance, ignored_layers=[model.second], pruning_ratio=0.6).step()
    tp.pruner.BasePruner(
        theirs, (x,), importance, ignored_layers=[theirs.second], pruning_ratio=0.6,
        in_channel_groups={}, out_channel_groups={}, num_heads={},
    ).step()  # fmt: skip

    assert report.removal is not None
    silent = silence_channels(dense, report.removal.plan, x)
    assert torch.equal(theirs.first.weight, model.first.weight)
    assert 1e-12 > (model(x) - silent(x)).abs().max()
    assert not torch.equal(theirs.norm.weight, model.norm.weight), "the host is mended: shorten the page"
    assert sorted(theirs.norm.weight.tolist()) == sorted(model.norm.weight.tolist())
    assert 1e-2 < (theirs(x) - silent(x)).abs().max()


def test_frozen_model_is_pruned_where_torch_pruning_sees_nothing(model: nn.Module, x: Tensor) -> None:
    model.requires_grad_(False)

    with torch.no_grad():
        report = pruner_of(model, x, pruning_ratio=0.5).step()

    assert report.removed == report.requested > 0
    assert not any(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"unwrapped_parameters": {nn.Parameter(torch.ones(3)): 0}}, "unwrapped_parameters is a dict, expected a list"),
        ({"unwrapped_parameters": [(nn.Parameter(torch.ones(3)), 0)]}, "is not of BenchNet, expected its own"),
        ({"customized_pruners": {nn.Conv2d(1, 1, 1): object()}}, "has a layer, a Conv2d, as key, expected a class"),
        ({"ignored_layers": [nn.Linear(8, 4)]}, "holds a Linear that is not of this BenchNet, expected its own"),
        ({"isomorphic": True}, "isomorphic=True was given without global_pruning=True"),
        ({"prune_num_heads": True}, "prune_num_heads=True was given, expected False"),
        ({"ch_sparsity": 0.5}, "ch_sparsity was given, which torch-pruning has deprecated"),
        ({"prunning_ratio": 0.5}, "was given 'prunning_ratio'.*Did you mean 'pruning_ratio'"),
        ({"pruning_ratio": 1.5}, "pruning_ratio=1.5 .* expected a ratio of 0 to 1"),
        ({"iterative_steps": 0}, "iterative_steps=0 .* at least one step"),
    ],
)
def test_arguments_that_torch_pruning_would_misread_are_refused(
    arguments: dict[str, object], message: str, model: nn.Module, x: Tensor
) -> None:
    with pytest.raises(ConfigError, match=message):
        pruner_of(model, x, **arguments)


def test_ways_around_the_certificate_are_refused(model: nn.Module, x: Tensor) -> None:
    pruner = pruner_of(model, x)

    with pytest.raises(ConfigError, match="interactive=True, expected False"):
        pruner.step(interactive=True)
    with pytest.raises(ConfigError, match="manual_prune_width was called with 0.25.*removes one minus the ratio"):
        pruner.manual_prune_width(model.stem[0], tp.prune_conv_out_channels, 0.25)
    assert 0 == pruner.current_step


def test_model_that_torch_pruning_cannot_trace_is_refused_by_name() -> None:
    net, example = ZOO["view_shuffle"].build(), ZOO["view_shuffle"].example_inputs()

    def fails(*args: object) -> object:
        raise ZeroDivisionError("integer division or modulo by zero")

    with pytest.raises(
        TraceError, match="cannot build its graph of Sequential: ZeroDivisionError.*nni_prune_ext.prune"
    ):
        CertifiedPruner(net, example, L1Importance(net, example), forward_fn=fails)


@pytest.mark.parametrize("found", ["1.5.2", "1.7.0", "2.0"])
def test_other_versions_of_torch_pruning_are_refused(
    found: str, model: nn.Module, x: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch_pruning_groups.metadata, "version", lambda name: found)

    for make in (lambda: L1Importance(model, x), lambda: CertifiedPruner(model, x, lambda group: None)):
        with pytest.raises(ConfigError, match=f"torch-pruning {found} is installed, expected 1.6"):
            make()


# what of torch-pruning's insides the adapter leans on


def test_host_still_has_what_the_adapter_leans_on(model: nn.Module, x: Tensor) -> None:
    graph = tp.DependencyGraph().build_dependency(model, (x,))
    group = graph.get_pruning_group(model.stem[0], tp.prune_conv_out_channels, [1, 2])

    assert graph.pruning_history() is graph.pruning_history(), "the history is no longer one list that can be extended"
    assert [1, 2] == group[0].idxs == group[0].root_idxs
    assert group[0].dep.handler == tp.prune_conv_out_channels
    assert group[0].dep.target.module is model.stem[0]
    assert model.stem[0] in graph.module2node
    assert 1 == graph.get_pruner_of_module(model.stem[0]).get_out_channel_groups(model.stem[0])


NEVER_RETURNS = {"in_place_write"}
"""Where torch-pruning 1.6 builds its graph for ever: its index lists multiply on a wrong mapping."""


def test_rewritten_shortcut_is_pruned_in_steps_and_has_no_history() -> None:
    torch.manual_seed(0)
    net, example = ZOO["option_a"].build(), ZOO["option_a"].example_inputs()
    pruner = CertifiedPruner(net, example, L1Importance(net, example), pruning_ratio=0.5, iterative_steps=2)

    reports = [pruner.step() for _ in range(2)]

    assert all(report.certificate is not None and report.certificate.exact for report in reports)
    with pytest.raises(PlanError, match="cannot be written as torch-pruning's history"):
        pruner.pruning_history()


@pytest.mark.parametrize("name", [name for name in ZOO if ZOO[name].prunable and name not in NEVER_RETURNS])
def test_every_topology_is_pruned_exactly_and_what_stays_has_a_reason(name: str) -> None:
    torch.manual_seed(0)
    net, example = ZOO[name].build(), ZOO[name].example_inputs()

    report = CertifiedPruner(net, example, L1Importance(net, example), pruning_ratio=0.5).step()

    assert isinstance(report, StepReport)
    assert report.certificate is None or report.certificate.exact
    assert report.removed == report.requested or report.skipped
    assert outputs(net, example, torch.float32)


@pytest.mark.slow
def test_convnext_is_right_at_a_ratio_where_torch_prunings_own_cut_is_wrong() -> None:
    """At 0.6, torch-pruning 1.6 permutes the norms of 768 channels; the same selection, cut by us, is exact."""
    torch.manual_seed(0)
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    model = torchvision.models.convnext_tiny(weights=None).double().eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.5 if parameter.dim() == 1 else 0.05)
    head = model.classifier[2]
    theirs, dense = copy.deepcopy(model), copy.deepcopy(model)
    importance = tp.importance.MagnitudeImportance(p=1)

    report = CertifiedPruner(model, x, importance, ignored_layers=[head], pruning_ratio=0.6).step()
    tp.pruner.BasePruner(
        theirs, (x,), importance, ignored_layers=[theirs.classifier[2]], pruning_ratio=0.6,
        in_channel_groups={}, out_channel_groups={}, num_heads={},
    ).step()  # fmt: skip

    assert report.removal is not None
    with torch.no_grad():
        expected = silence_channels(dense, report.removal.plan, x)(x)
    error = {
        name: float((net(x) - expected).detach().norm() / expected.norm())
        for name, net in (("ours", model), ("tp", theirs))
    }
    assert 1e-9 > error["ours"]
    assert 1e-2 < error["tp"], "the host is mended: shorten the page"


@pytest.mark.parametrize("name", ["dense", "segmenter", "layer_norm", "nchw_flatten", "squeeze_excite"])
def test_second_step_selects_what_torch_pruning_selects_on_its_own_cut(name: str) -> None:
    torch.manual_seed(0)
    ours, example = ZOO[name].build(), ZOO[name].example_inputs()
    theirs = copy.deepcopy(ours)
    arguments = {"pruning_ratio": 0.5, "iterative_steps": 2}
    certified = CertifiedPruner(ours, example, L1Importance(ours, example), **arguments)
    vanilla = tp.pruner.BasePruner(
        theirs, (example,), L1Importance(theirs, example), **arguments,
        in_channel_groups={}, out_channel_groups={}, num_heads={},
    )  # fmt: skip

    for _ in range(2):
        certified.step()
        vanilla.step()

    expected = theirs.state_dict()
    assert [] == [key for key, value in ours.state_dict().items() if not torch.equal(value, expected[key])]
    assert certified.DG.pruning_history() == certified.pruning_history()
    assert len(vanilla.pruning_history()) == len(certified.pruning_history())
