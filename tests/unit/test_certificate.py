"""What the certificate proves, what it refuses, and which groups verification protects."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from nni_prune_ext import certificate as certificates
from nni_prune_ext.certificate import Certificate, certify_plan, remove_channels, verify_groups
from nni_prune_ext.errors import CertificateError, PlanError
from nni_prune_ext.graph.channel_groups import trace_channel_groups
from nni_prune_ext.plan import plan_from_channels
from nni_prune_ext.testing.toy_blocks import Apply
from nni_prune_ext.testing.toy_models import ZOO


def between(function: Callable[[Tensor], Tensor], *, width: int = 8) -> nn.Module:
    """Returns two convolutions with a function in between, followed by one more that is safe."""
    safe = [nn.Conv2d(width, width, 1), nn.ReLU(), nn.Conv2d(width, 4, 1)]
    return nn.Sequential(nn.Conv2d(3, width, 1), Apply(function), *safe)


IMAGE = torch.randn(2, 3, 4, 4)


def test_a_removal_comes_with_its_proof() -> None:
    model, inputs = ZOO["residual"].build(), ZOO["residual"].example_inputs()
    groups = trace_channel_groups(model, inputs)

    removal = remove_channels(model, plan_from_channels(groups, {"0.0": [1]}), inputs, probes=3, seed=5)

    proof = removal.certificate
    assert proof is not None
    assert (True, 3, 5, "float64") == (proof.exact, proof.probes, proof.seed, proof.dtype)
    assert proof.max_relative_error < 1e-12
    assert min(proof.input_effect, proof.removal_effect) > 1e-3
    assert proof.as_dict()["exact"] is True


def test_a_plan_that_removes_nothing_needs_no_proof() -> None:
    model, inputs = ZOO["chain"].build(), ZOO["chain"].example_inputs()
    groups = trace_channel_groups(model, inputs)

    removal = remove_channels(model, plan_from_channels(groups, {}), inputs)

    assert removal.certificate is None
    assert [p.shape for p in model.parameters()] == [p.shape for p in removal.model.parameters()]


def test_two_certificates_with_one_seed_agree() -> None:
    model, inputs = ZOO["layer_norm"].build(), ZOO["layer_norm"].example_inputs()
    groups = trace_channel_groups(model, inputs)
    plan = plan_from_channels(groups, {"0.0": [1]})

    assert certify_plan(model, plan, inputs, groups=groups) == certify_plan(model, plan, inputs, groups=groups)


def test_a_plan_for_another_model_is_refused() -> None:
    chain, residual = ZOO["chain"], ZOO["residual"]
    plan = plan_from_channels(trace_channel_groups(chain.build(), chain.example_inputs()), {"0.0": [1]})

    with pytest.raises(PlanError, match="another model"):
        remove_channels(residual.build(), plan, residual.example_inputs())


@pytest.mark.parametrize(
    ("function", "words"),
    [
        (lambda x: x / x.shape[1], "removed and silenced differ"),
        (lambda x: torch.from_numpy(x.numpy().cumsum(1)), "after the cut the forward pass fails"),
        (lambda x: x.reshape(2, 8, 16).view(2, 8, 4, 4), "after the cut the forward pass fails"),
    ],
)
def test_what_the_trace_cannot_see_is_found_protected_and_refused(
    function: Callable[[Tensor], Tensor], words: str
) -> None:
    model = between(function)
    groups = trace_channel_groups(model, IMAGE)
    plan = plan_from_channels(groups, {"0": [0, 5]})

    verified = verify_groups(model, IMAGE, groups)

    assert ["2"] == [group.name for group in verified]
    assert words in {p.root: p.reason for p in verified.protected}["0"]
    with pytest.raises(CertificateError, match=rf"{words}.*Expected.*verify_groups"):
        remove_channels(model, plan, IMAGE)


def test_several_culprits_are_found_among_many_good_groups() -> None:
    layers: list[nn.Module] = [nn.Conv2d(3, 8, 1)]
    for number in range(12):
        layers += [Apply(lambda x: x / x.shape[1]) if number in (2, 3, 9) else nn.ReLU(), nn.Conv2d(8, 8, 1)]
    model = nn.Sequential(*layers)

    verified = verify_groups(model, IMAGE, trace_channel_groups(model, IMAGE))

    culprits = {p.root for p in verified.protected if "differ" in p.reason}
    assert {"4", "6", "18"} == culprits
    assert 9 == len(verified)


def test_bisecting_tries_few_sets() -> None:
    names, tried = [f"g{i}" for i in range(64)], []

    def flaw_of(chosen: list[str]) -> str | None:
        tried.append(chosen)
        return "wrong" if {"g7", "g40"} & set(chosen) else None

    reasons = certificates._culprits(names, flaw_of)

    assert {"g7": "wrong", "g40": "wrong"} == reasons
    assert len(tried) <= 20


def test_a_model_whose_output_ignores_its_input_proves_nothing() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 4, 1), Apply(lambda x: x.clamp(0.0, 0.0)))

    verified = verify_groups(model, IMAGE, trace_channel_groups(model, IMAGE))

    assert 0 == len(verified)
    assert "nothing was shown" in verified.protected[-1].reason


def test_channels_that_a_probe_switches_off_are_probed_again() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 4), nn.ReLU(), nn.Conv2d(8, 4, 1))
    groups = trace_channel_groups(model, IMAGE[:1])

    proofs = [
        certify_plan(model, plan_from_channels(groups, {"0": [c]}), IMAGE[:1], groups=groups, probes=1, seed=c)
        for c in range(8)
    ]

    assert all(proof.exact for proof in proofs)
    assert any(proof.probes > 1 for proof in proofs)


class RoundedNorm(nn.Module):
    """An RMS norm of its own that works in float32 whatever it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8)

    def forward(self, x: Tensor) -> Tensor:
        scaled = self.norm(x.float().permute(0, 2, 3, 1).to(self.norm.weight.dtype)).to(torch.float32) + torch.zeros(1)
        return scaled.permute(0, 3, 1, 2).type_as(x)


def test_a_model_that_rounds_to_float32_inside_is_probed_in_float64_throughout() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 1), RoundedNorm(), nn.Conv2d(8, 4, 1))
    groups = trace_channel_groups(model, IMAGE)

    proof = certify_plan(model, plan_from_channels(groups, {"0": [1, 2]}), IMAGE, groups=groups)

    assert proof.exact
    assert proof.max_relative_error < 1e-13


def test_a_model_that_does_not_run_in_float64_is_probed_in_float32() -> None:
    class Single(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 4, 1)
            self.kernel = torch.ones(8, 1, 1, 1, dtype=torch.float32)

        def forward(self, x: Tensor) -> Tensor:
            if x.dtype != torch.float32:
                raise RuntimeError("float32 only")
            return self.second(torch.relu(self.first(x)))

    model = Single()
    groups = trace_channel_groups(model, IMAGE)

    proof = certify_plan(model, plan_from_channels(groups, {"first": [1]}), IMAGE, groups=groups)

    assert ("float32", 1e-4, True) == (proof.dtype, proof.bound, proof.exact)


def test_random_numbers_in_the_forward_pass_are_the_same_for_both() -> None:
    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            noise = torch.randn(x.shape[0], 1, 1, 1, dtype=x.dtype)
            return self.second(torch.relu(self.first(x) + noise))

    model = Noisy()
    groups = trace_channel_groups(model, IMAGE)

    assert certify_plan(model, plan_from_channels(groups, {"first": [1]}), IMAGE, groups=groups).exact


def test_features_inside_a_dataclass_count_as_output() -> None:
    @dataclass
    class Result:
        features: Tensor
        logits: Tensor

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.third = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 6, 1), nn.Conv2d(6, 4, 1)

        def forward(self, x: Tensor) -> Result:
            features = self.first(x)
            return Result(features, self.third(self.second(features)))

    groups = trace_channel_groups(Model(), IMAGE)

    assert ["second"] == [group.name for group in groups]


@pytest.mark.parametrize("error", [float("nan"), float("inf"), 1e-8])
def test_a_certificate_with_a_large_or_unknown_error_is_not_exact(error: float) -> None:
    proof = Certificate(error, 1e-9, 2, 0, "float64", 1.0, 1.0)

    assert not proof.exact
    assert proof.flaw() is not None


def test_a_probe_that_dies_on_the_way_is_replaced() -> None:
    layers = [nn.Conv2d(3, 2, 4), *(part for _ in range(4) for part in (nn.ReLU(), nn.Conv2d(2, 2, 1, bias=False)))]
    model = nn.Sequential(*layers)
    groups = trace_channel_groups(model, IMAGE[:1])

    verified = [verify_groups(model, IMAGE[:1], groups, seed=seed) for seed in range(5)]

    assert [4] * 5 == [len(groups) for groups in verified]


def test_a_group_in_which_every_layer_has_one_channel_is_protected() -> None:
    class Single(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.head = nn.Conv2d(3, 1, 1), nn.Conv2d(3, 1, 1), nn.Conv2d(2, 4, 1)
            self.both = nn.Conv2d(3, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(torch.cat([self.a(x), self.b(x)], 1) + self.both(x))

    model = Single()

    verified = verify_groups(model, IMAGE, trace_channel_groups(model, IMAGE))

    assert {"a": "every channel is the last one of some layer"} == {
        p.root: p.reason for p in verified.protected if p.root != "head"
    }


class Branch(nn.Module):
    """A chain, with a side branch that is combined with it by a function."""

    def __init__(self, combine: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 4, 1)
        self.side, self.join = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 4, 1)
        self.combine = combine

    def forward(self, x: Tensor) -> Tensor:
        return self.combine(self.last(torch.relu(self.first(x))), self.join(torch.relu(self.side(x))))


@pytest.mark.parametrize(
    "combine",
    [
        lambda y, side: y + 0.0 * side,
        lambda y, side: y + side - side.detach(),
        lambda y, side: y,
        lambda y, side: y + (side > 1e9).to(y.dtype),
    ],
)
def test_a_group_that_never_moves_the_output_is_protected(combine: Callable[[Tensor, Tensor], Tensor]) -> None:
    model = Branch(combine)

    verified = verify_groups(model, IMAGE, trace_channel_groups(model, IMAGE))

    assert ["first"] == [group.name for group in verified]
    assert "does not move the output" in {p.root: p.reason for p in verified.protected}["side"]


@pytest.mark.parametrize(
    "combine",
    [
        lambda y, side: y + side,
        lambda y, side: y + side.detach(),
        torch.no_grad()(lambda y, side: y + side),
        lambda y, side: y + torch.from_numpy(side.detach().numpy()),
    ],
)
def test_a_group_whose_gradient_is_cut_off_is_still_shown_to_matter(
    combine: Callable[[Tensor, Tensor], Tensor],
) -> None:
    model = Branch(combine)

    assert 2 == len(verify_groups(model, IMAGE, trace_channel_groups(model, IMAGE)))


def test_a_group_that_nothing_reads_is_protected() -> None:
    class Unread(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last, self.side = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 4, 1), nn.Conv2d(3, 8, 1)

        def forward(self, x: Tensor) -> Tensor:
            self.side(x)
            return self.last(self.first(x))

    model = Unread()

    verified = verify_groups(model, IMAGE, trace_channel_groups(model, IMAGE))

    assert ["first"] == [group.name for group in verified]
    assert "no layer was seen to read these channels" == verified.protected[-1].reason


@pytest.mark.parametrize("last", [lambda x: x.argmax(1), lambda x: x > 0, lambda x: (x.mean((2, 3)) > 0).float()])
def test_outputs_that_are_not_continuous_prove_nothing(last: Callable[[Tensor], Tensor]) -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 4, 1), Apply(last))
    groups = trace_channel_groups(model, IMAGE)

    proof = certify_plan(model, plan_from_channels(groups, {"0": [0, 1]}), IMAGE, groups=groups)
    verified = verify_groups(model, IMAGE, groups)

    assert not proof.exact
    assert "nothing was shown" in str(proof.flaw())
    assert 0 == len(verified)


def test_removal_without_verified_groups_refuses_a_group_about_which_nothing_can_be_shown() -> None:
    class DeadBranch(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.live, self.dead, self.head = nn.Conv2d(3, 8, 1), nn.Conv2d(3, 8, 1), nn.Linear(8, 2)
            self.reader = nn.Conv2d(8, 8, 1)

        def forward(self, x: Tensor) -> Tensor:
            hidden = self.live(x).relu() + 0.0 * self.reader(self.dead(x).relu())
            return self.head(hidden.mean((2, 3)))

    model, images = DeadBranch().eval(), torch.randn(1, 3, 4, 4)
    groups = trace_channel_groups(model, images)
    plan = plan_from_channels(groups, {"live": [0, 1], "dead": [2, 3]})

    with pytest.raises(CertificateError, match="'dead'"):
        remove_channels(model, plan, images)
