"""Our criteria inside torch-pruning's own pruner, and what they promise to any caller."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
import torch_pruning as tp
from torch import Tensor, nn

from nni_prune_ext import prune, trace_channel_groups, verify_groups
from nni_prune_ext.adapters.torch_pruning_groups import NO_CHANNEL, ChannelNumbers, tensor_names
from nni_prune_ext.errors import ConfigError, ModelError, PluginError, UnknownPluginError
from nni_prune_ext.methods.baselines import L1
from nni_prune_ext.pipeline import method_spec
from nni_prune_ext.registry import plugins
from nni_prune_ext.testing.method_bench import BenchNet, modes_of
from nni_prune_ext.testing.toy_models import ZOO
from nni_prune_ext.torch_pruning import (
    CertifiedPruner,
    FPGMImportance,
    L1Importance,
    L2Importance,
    MethodImportance,
    RandomImportance,
    TaylorImportance,
    importance_for,
)

CRITERIA = [name for name in plugins("pruners") if method_spec(name).scores is not None]
FRESH: dict[str, object] = {"in_channel_groups": {}, "out_channel_groups": {}, "num_heads": {}}


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return BenchNet()


@pytest.fixture
def x() -> Tensor:
    return torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def batches(x: Tensor) -> list[tuple[Tensor, Tensor]]:
    return [(x, torch.tensor([0, 3])), (x.flip(0), torch.tensor([1, 2]))]


def graph_of(model: nn.Module, x: Tensor) -> tp.DependencyGraph:
    training = model.training
    graph = tp.DependencyGraph().build_dependency(model, (x,), verbose=False)
    model.train(training)
    return graph


def group_of(graph: tp.DependencyGraph, layer: nn.Conv2d) -> object:
    return graph.get_pruning_group(layer, tp.prune_conv_out_channels, list(range(layer.out_channels)))


def vanilla(model: nn.Module, x: Tensor, importance: MethodImportance, **arguments: object) -> tp.pruner.BasePruner:
    return tp.pruner.BasePruner(model, (x,), importance, **{**FRESH, **arguments})


@pytest.mark.parametrize("name", CRITERIA)
def test_vanilla_pruner_with_our_criterion_leaves_the_tensors_of_our_own_pipeline(
    name: str, model: nn.Module, x: Tensor, batches: list[tuple[Tensor, Tensor]]
) -> None:
    data = batches if method_spec(name).needs_data else None
    own = prune(model, x, method=name, target="ratio=0.5", scope="local", train_batches=data, options=None).removed_only
    pruner = vanilla(
        model, x, importance_for(name)(model, x, batches=data), pruning_ratio=0.5, ignored_layers=[model.head]
    )

    pruner.step()

    expected, found = own.state_dict(), model.state_dict()
    assert [] == [key for key in expected if not torch.equal(expected[key], found[key])]


@pytest.mark.parametrize("name", CRITERIA)
def test_scoring_leaves_gradients_modes_and_random_state_as_they_were(
    name: str, model: nn.Module, x: Tensor, batches: list[tuple[Tensor, Tensor]]
) -> None:
    model.train()
    model.stem.eval()
    model.back.requires_grad_(False)
    graph = graph_of(copy.deepcopy(model).requires_grad_(True), x)
    graph.model.load_state_dict(model.state_dict())
    model = graph.model
    model.train()
    model.stem.eval()
    model.back.requires_grad_(False)
    model.head.weight.grad = gradient = torch.ones_like(model.head.weight)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    modes, random = modes_of(model), torch.get_rng_state()

    with torch.no_grad():
        scores = importance_for(name)(model, x, batches=batches)(group_of(graph, model.stem[0]))

    assert (12,) == tuple(scores.shape)
    assert model.head.weight.grad is gradient
    assert bool((gradient == 1).all())
    assert [] == [key for key, p in model.named_parameters() if p.grad is not None and p is not model.head.weight]
    assert modes == modes_of(model)
    assert not any(p.requires_grad for p in model.back.parameters())
    assert [] == [key for key, value in model.state_dict().items() if not torch.equal(value, before[key])]
    assert torch.equal(random, torch.get_rng_state())


def test_scores_come_in_the_order_of_the_indices_asked_for(model: nn.Module, x: Tensor) -> None:
    graph, importance = graph_of(model, x), L1Importance(model, x)
    layer = model.inside[0]

    everything = importance(group_of(graph, layer))
    some = importance(graph.get_pruning_group(layer, tp.prune_conv_out_channels, [7, 2, 11]))

    assert torch.equal(everything[[7, 2, 11]], some)
    assert everything.device.type == "cpu"
    assert everything.dtype == torch.float32


def test_partners_in_a_chunk_share_one_score_so_that_half_is_half() -> None:
    torch.manual_seed(0)
    model, x = ZOO["swiglu"].build(), ZOO["swiglu"].example_inputs()
    theirs = copy.deepcopy(model)
    layer = model[2].up

    vanilla(
        model, x, L1Importance(model, x), pruning_ratio=0.5, ignored_layers=[model[1], model[3], model[2].down]
    ).step()
    vanilla(
        theirs, x, tp.importance.MagnitudeImportance(p=1), pruning_ratio=0.5,
        ignored_layers=[theirs[1], theirs[3], theirs[2].down],
    ).step()  # fmt: skip

    assert 12 // 2 == layer.out_features
    assert 12 // 2 != theirs[2].up.out_features, "torch-pruning now couples chunks before it selects: shorten the page"


def test_grouped_convolution_gets_one_score_per_channel_of_every_group() -> None:
    torch.manual_seed(0)
    model, x = ZOO["grouped"].build(), ZOO["grouped"].example_inputs()
    graph, importance = graph_of(model, x), L1Importance(model, x)
    layer = next(m for m in model.modules() if isinstance(m, nn.Conv2d) and m.groups == 4)

    scores = importance(group_of(graph, layer))

    assert (12,) == tuple(scores.shape)
    assert torch.equal(scores, scores.view(4, 3)[:1].expand(4, 3).reshape(-1))


def test_all_groups_are_scored_once_per_state_of_the_model(
    model: nn.Module, x: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []

    def counted(context: object, options: object) -> object:
        calls.append(1)
        return L1.scores(context, options)

    graph, importance = graph_of(model, x), L1Importance(model, x)
    importance.spec = dataclasses.replace(importance.spec, scores=counted)
    stem, inside = group_of(graph, model.stem[0]), group_of(graph, model.inside[0])

    first = importance(stem)
    importance(inside)
    assert 1 == len(calls)

    model.stem[0].weight.data[3] = 0  # in-place edits of .data leave the version counter alone
    second = importance(stem)

    assert 2 == len(calls)
    assert second[3] < first[3]


def test_scores_follow_a_cut_by_torch_pruning(model: nn.Module, x: Tensor) -> None:
    graph, importance = graph_of(model, x), L1Importance(model, x)
    before = importance(group_of(graph, model.inside[0]))

    graph.get_pruning_group(model.inside[0], tp.prune_conv_out_channels, [0, 5]).prune()
    after = importance(group_of(graph, model.inside[0]))

    assert (16,) == tuple(before.shape)
    assert (14,) == tuple(after.shape)


def test_protected_groups_have_no_score_now_and_after_other_groups_were_cut(model: nn.Module, x: Tensor) -> None:
    pruner = vanilla(model, x, L1Importance(model, x), pruning_ratio=0.5, iterative_steps=3)

    for _ in range(3):
        pruner.step()
        assert ["head"] == list(pruner.importance.skipped)

    assert "output" in pruner.importance.skipped["head"]
    assert (4, 4) == tuple(model.head.weight.shape)


def test_none_first_and_scores_later_collapses_a_global_scope_of_torch_pruning(model: nn.Module, x: Tensor) -> None:
    """Why a refusal is for good: the host takes the size of the scope from the first step."""

    def widths(pruner: tp.pruner.BasePruner) -> int:
        for _ in range(2):
            pruner.step()
        return sum(m.out_channels for m in pruner.model.modules() if isinstance(m, nn.Conv2d))

    class Late:
        def __init__(self, importance: MethodImportance) -> None:
            self.importance, self.calls = importance, 0

        def __call__(self, group: object) -> Tensor | None:
            self.calls += 1
            return None if self.calls <= 3 else self.importance(group)

    arguments = {"global_pruning": True, "iterative_steps": 2, "pruning_ratio": 0.5, "ignored_layers": [model.head]}
    other = copy.deepcopy(model)
    late = Late(L1Importance(other, x))

    steady = widths(vanilla(model, x, L1Importance(model, x), **arguments))
    collapsed = widths(vanilla(other, x, late, **{**arguments, "ignored_layers": [other.head]}))

    assert collapsed < steady


def test_every_registered_criterion_has_a_class_and_the_named_ones_are_it() -> None:
    named = {"l1": L1Importance, "l2": L2Importance, "fpgm": FPGMImportance}
    named |= {"random": RandomImportance, "taylor": TaylorImportance}

    assert named == {name: importance_for(name) for name in named}
    assert all(issubclass(importance_for(name), tp.importance.Importance) for name in CRITERIA)


def test_criterion_from_another_package_gets_a_class_of_its_own(model: nn.Module, x: Tensor, own_method: str) -> None:
    made = importance_for(own_method)

    assert made is importance_for(own_method)
    assert "CONSTANTImportance" == made.__name__ or "ConstantImportance" == made.__name__
    assert [1.0] * 12 == made(model, x)(group_of(graph_of(model, x), model.stem[0])).tolist()


@pytest.fixture
def own_method(tmp_path: object, monkeypatch: pytest.MonkeyPatch) -> str:
    text = (
        "import dataclasses, torch\n"
        "from nni_prune_ext.methods.baselines import L1\n"
        "ones = lambda context, options: {g.name: torch.ones(g.num_channels) for g in context.groups}\n"
        "CONSTANT = dataclasses.replace(L1, name='constant', scores=ones)\n"
        "SHORT = dataclasses.replace(L1, name='short', scores=lambda c, o: {g.name: torch.ones(1) for g in c.groups})\n"
        "NAN = dataclasses.replace(L1, name='nan', scores=lambda c, o: {g.name: torch.full((g.num_channels,),"
        " float('nan')) for g in c.groups})\n"
        "SEARCH = dataclasses.replace(L1, name='search', scores=None)\n"
    )
    (tmp_path / "strange_methods.py").write_text(text)  # type: ignore[operator]
    monkeypatch.syspath_prepend(str(tmp_path))
    return "strange_methods:CONSTANT"


@pytest.mark.parametrize(("which", "seen"), [("SHORT", r"shape \(1,\)"), ("NAN", "NaN")])
def test_scores_that_torch_pruning_would_take_in_silence_are_refused(
    which: str, seen: str, model: nn.Module, x: Tensor, own_method: str
) -> None:
    importance = importance_for(f"strange_methods:{which}")(model, x)

    with pytest.raises(PluginError, match=rf"group 'stem.0' have {seen}, expected \(12,\)"):
        importance(group_of(graph_of(model, x), model.stem[0]))


def test_method_that_is_no_criterion_is_refused_by_the_class_of_criteria(
    own_method: str, model: nn.Module, x: Tensor
) -> None:
    class Search(MethodImportance):
        method = "strange_methods:SEARCH"

    with pytest.raises(PluginError, match="'strange_methods:SEARCH' has no scores.*Use one of fpgm, l1, l2"):
        Search(model, x)


def test_unknown_method_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(UnknownPluginError, match="Did you mean 'taylor'"):
        importance_for("tailor")


def test_missing_data_wrong_options_and_other_models_are_refused(model: nn.Module, x: Tensor) -> None:
    with pytest.raises(ConfigError, match="was given no data, expected training batches.*Pass batches="):
        TaylorImportance(model, x)
    with pytest.raises(ConfigError, match="Option 'batches' of method 'taylor' is 0"):
        TaylorImportance(model, x, batches=[], options={"batches": 0})

    other = copy.deepcopy(model)
    with pytest.raises(ModelError, match="no layer of its model, a BenchNet"):
        L1Importance(model, x)(group_of(graph_of(other, x), other.stem[0]))


def test_importance_knows_the_groups_that_the_trial_protects(model: nn.Module, x: Tensor) -> None:
    verified = verify_groups(model, x, trace_channel_groups(model, x))

    assert verified.fingerprint == L1Importance(model, x).followed.current().fingerprint


class ImageInside(nn.Module):
    """The image itself is added to three of eight channels, which therefore stay."""

    def __init__(self, *, first: bool) -> None:
        super().__init__()
        self.first = first
        self.added, self.wide, self.next = nn.Conv2d(3, 5, 1), nn.Conv2d(3, 8, 1), nn.Conv2d(8, 6, 1)
        self.head = nn.Conv2d(6, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        joined = torch.cat([x, self.added(x)] if self.first else [self.added(x), x], 1)
        result: Tensor = self.head(torch.relu(self.next(torch.relu(joined + self.wide(x)))))
        return result


@pytest.mark.parametrize("first", [True, False])
def test_layer_of_which_some_channels_must_stay_has_no_score(first: bool, x: Tensor) -> None:
    """With the image first, torch-pruning's indices lie outside the layer beside it."""
    model = ImageInside(first=first)
    graph, importance = graph_of(model, x), L1Importance(model, x)

    assert [5] == [group.num_channels for group in importance.followed.current() if group.name == "added"]
    assert importance(group_of(graph, model.wide)) is None
    assert importance(group_of(graph, model.next)) is not None
    assert ["wide"] == list(importance.skipped)


def test_scores_are_given_for_the_free_channels_of_a_layer_and_refused_for_the_others(x: Tensor) -> None:
    model = ImageInside(first=False)
    graph = graph_of(model, x)

    free = L1Importance(model, x)(graph.get_pruning_group(model.wide, tp.prune_conv_out_channels, [0, 4]))
    held = L1Importance(model, x)(graph.get_pruning_group(model.wide, tp.prune_conv_out_channels, [6]))

    assert free is not None
    assert (2,) == tuple(free.shape)
    assert held is None


def test_one_protected_position_is_enough_to_refuse_a_group(model: nn.Module, x: Tensor) -> None:
    numbers = ChannelNumbers.of(trace_channel_groups(model, x))
    group = group_of(graph_of(model, x), model.stem[0])
    assert [[channel] for channel in range(12)] == [c.tolist() for c in numbers.behind(group, tensor_names(model))]

    numbers.places["stem.0.weight", 0][3] = NO_CHANNEL

    assert numbers.behind(group, tensor_names(model)) is None


def test_certified_pruner_passes_over_indices_that_no_layer_has(x: Tensor) -> None:
    model = ImageInside(first=True)

    report = CertifiedPruner(model, x, tp.importance.RandomImportance(), pruning_ratio=0.5).step()

    assert {"next"} == {change.layer for change in report.layers if change.removed}
    assert "indices lie outside 'added'" in report.skipped["wide"]
