"""Gates drawn between 0 and 1: what is drawn, what is learnt from it, and how gradients are scaled."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from nni_prune_ext.methods.gate_exploration import GateExploration


def scores_of(**sizes: int) -> dict[str, nn.Parameter]:
    return {name: nn.Parameter(torch.ones(size)) for name, size in sizes.items()}


def masks_of(scores: dict[str, nn.Parameter], *, kept: bool = True) -> dict[str, Tensor]:
    return {name: torch.full(score.shape, kept) for name, score in scores.items()}


def weighed(
    exploration: GateExploration, scores: dict[str, nn.Parameter], **gradients: list[float]
) -> dict[str, Tensor]:
    """Returns what is left of these gradients."""
    for name, gradient in gradients.items():
        scores[name].grad = torch.tensor(gradient)
    exploration.weigh(scores)
    return {name: score.grad.clone() for name, score in scores.items() if score.grad is not None}


# -- draws -------------------------------------------------------------------------------------------------------


def drawn(seed: int, steps: int = 3, share: float = 0.3) -> list[Tensor]:
    exploration, scores = GateExploration(share, scaled=True), scores_of(a=50, b=14)
    exploration.begin(scores, seed)
    rows = []
    for _ in range(steps):
        rows.append(exploration.row(masks_of(scores), scores).detach())
        exploration.draw(scores)
    return rows


def test_equal_seeds_give_equal_draws_others_not_and_every_step_draws_anew() -> None:
    torch.manual_seed(1)
    first = drawn(7)
    torch.manual_seed(2)
    again = drawn(7)

    assert all(torch.equal(a, b) for a, b in zip(first, again))
    assert not torch.equal(first[0], first[1])
    assert not torch.equal(first[0], drawn(8)[0])


def test_a_row_holds_masks_in_order_drawn_gates_in_their_place_and_a_one_behind_them() -> None:
    scores = scores_of(a=300, b=200)
    masks = {"a": torch.arange(300) % 2 == 0, "b": torch.arange(200) % 3 == 0}
    plain = torch.cat([*masks.values(), torch.ones(1)]).float()
    exploration = GateExploration(0.25, scaled=True)
    assert torch.equal(plain, exploration.row(masks, scores))
    exploration.begin(scores, 0)

    row = exploration.row(masks, scores).detach()

    other = row != plain
    assert not other[-1]
    assert 0.25 == pytest.approx(float(other.float().mean()), abs=0.05)
    assert bool(((row > 0) & (row < 1))[other].all())
    with torch.no_grad():
        assert torch.equal(plain, exploration.row(masks, scores))
    exploration.end()
    assert torch.equal(plain, exploration.row(masks, scores))


def test_gates_that_are_drawn_are_spread_evenly_from_0_to_1() -> None:
    rows = torch.cat([row[:-1] for row in drawn(0, steps=300)])

    values = rows[rows != 1].sort().values
    torch.testing.assert_close(values, torch.linspace(0, 1, len(values)), rtol=0, atol=0.04)


# -- what the gradients of drawn gates say -----------------------------------------------------------------------


@pytest.mark.parametrize("kept", [True, False])
def test_explored_gradients_average_to_the_difference_that_a_channel_makes(kept: bool) -> None:
    # As many channels as draws: the loss of each is the same function of its own gate, stationary at the open one.
    def loss(gate: Tensor) -> Tensor:
        return (gate - 1).square() * (3 + gate) - 0.2 * gate.square() * (2 - gate).square()

    exploration, scores = GateExploration(0.5, scaled=False), scores_of(only=40_000)
    exploration.begin(scores, 0)
    loss(exploration.row(masks_of(scores, kept=kept), scores)[:-1]).sum().backward()
    exploration.weigh(scores)

    gradient = scores["only"].grad
    assert gradient is not None
    found = gradient[gradient != 0]
    assert 20_000 == pytest.approx(len(found), rel=0.05)
    difference = float(loss(torch.ones(())) - loss(torch.zeros(())))
    assert -3.2 == pytest.approx(difference)
    assert difference == pytest.approx(float(found.mean()), abs=0.05)


def test_without_exploration_the_gradient_at_an_open_gate_says_nothing_here() -> None:
    exploration, scores = GateExploration(0.0, scaled=False), scores_of(only=1)
    exploration.begin(scores, 0)
    (exploration.row(masks_of(scores), scores)[:-1] - 1).square().sum().backward()

    exploration.weigh(scores)

    assert scores["only"].grad is not None
    assert [0.0] == scores["only"].grad.tolist()


def test_only_explored_channels_learn() -> None:
    exploration, scores = GateExploration(0.3, scaled=False), scores_of(a=40, b=60)
    exploration.begin(scores, 0)
    row = exploration.row(masks_of(scores), scores).detach()

    found = weighed(exploration, scores, a=[2.0] * 40, b=[-1.0] * 60)

    expected = torch.cat([torch.full((40,), 2.0), torch.full((60,), -1.0)]) * (row[:-1] != 1)
    assert torch.equal(expected, torch.cat([found["a"], found["b"]]))


# -- the scale of gradients --------------------------------------------------------------------------------------


def test_gradients_are_divided_by_a_root_mean_square_per_group_over_steps() -> None:
    exploration, scores = GateExploration(0.0, scaled=True), scores_of(a=2, b=1)
    exploration.begin(scores, 0)

    first = weighed(exploration, scores, a=[3.0, 4.0], b=[2.0])
    second = weighed(exploration, scores, a=[0.0, 1.0], b=[4.0])

    torch.testing.assert_close(first["a"], torch.tensor([3.0, 4.0]) / math.sqrt(12.5))
    torch.testing.assert_close(first["b"], torch.tensor([1.0]))
    size = math.sqrt((0.99 * 25 + 1) / (0.99 * 2 + 2)), math.sqrt((0.99 * 4 + 16) / (0.99 + 1))
    torch.testing.assert_close(second["a"], torch.tensor([0.0, 1.0]) / size[0])
    torch.testing.assert_close(second["b"], torch.tensor([4.0]) / size[1])
    torch.testing.assert_close(exploration.sizes, torch.tensor([[25.75, 19.96], [3.98, 1.99]]))


def test_sizes_fade_by_a_hundredth_per_step() -> None:
    exploration, scores = GateExploration(0.0, scaled=True), scores_of(only=1)
    exploration.begin(scores, 0)

    found = [float(weighed(exploration, scores, only=[value])["only"]) for value in (2.0, 1.0, 3.0)]

    # The sum of squares over the number of steps, by hand: 4 / 1; (3.96 + 1) / 1.99; (4.9104 + 9) / 2.9701.
    expected = [2 / math.sqrt(4), 1 / math.sqrt(4.96 / 1.99), 3 / math.sqrt(13.9104 / 2.9701)]
    assert expected == pytest.approx(found)
    torch.testing.assert_close(torch.tensor([[13.9104], [2.9701]]), exploration.sizes)


def test_a_large_gradient_is_remembered_for_hundreds_of_steps() -> None:
    exploration, scores = GateExploration(0.0, scaled=True), scores_of(only=1)
    exploration.begin(scores, 0)
    weighed(exploration, scores, only=[1000.0])

    found = [float(weighed(exploration, scores, only=[1.0])["only"]) for _ in range(300)]

    # After 100 steps the first square still is 1000² × 0.99¹⁰⁰ of a sum over (1 − 0.99¹⁰¹) / 0.01 steps.
    steps = (1 - 0.99**101) / 0.01
    assert math.sqrt(steps / (1e6 * 0.99**100)) == pytest.approx(found[99], rel=1e-3)
    assert found == sorted(found)


def test_groups_whose_gradients_differ_a_thousandfold_end_at_the_same_root_mean_square() -> None:
    exploration, scores = GateExploration(0.25, scaled=True), scores_of(small=40, large=24)
    exploration.begin(scores, 0)
    generator = torch.Generator().manual_seed(1)
    squares: dict[str, list[Tensor]] = {"small": [], "large": []}

    for _ in range(600):
        small, large = torch.randn(40, generator=generator), 1000 * torch.randn(24, generator=generator)
        found = weighed(exploration, scores, small=small.tolist(), large=large.tolist())
        for name, gradient in found.items():
            squares[name].append(gradient[gradient != 0].square())
        exploration.draw(scores)

    sizes = {name: float(torch.cat(own[300:]).mean().sqrt()) for name, own in squares.items()}
    assert {"small": 1.0, "large": 1.0} == pytest.approx(sizes, abs=0.05)


def test_gradients_of_a_single_explored_channel_keep_their_proportions_and_do_not_become_signs() -> None:
    exploration, scores = GateExploration(1.0, scaled=True), scores_of(only=1)
    exploration.begin(scores, 0)
    given = [(-1) ** step * 10.0 ** (step % 3) for step in range(60)]

    found = [float(weighed(exploration, scores, only=[value])["only"]) for value in given]

    assert all((value > 0) == (own > 0) for value, own in zip(given, found))
    assert all(abs(own) == pytest.approx(abs(value) / math.sqrt(3367), rel=0.15)
               for value, own in list(zip(given, found))[30:])  # fmt: skip


def test_channels_that_are_not_explored_do_not_enter_the_size_and_a_group_without_any_keeps_its_own() -> None:
    exploration, scores = GateExploration(0.1, scaled=True), scores_of(a=3, b=2)
    exploration.begin(scores, 0)
    for explored in ([1, 0, 0, 1, 1], [0, 0, 0, 1, 0]):
        exploration._explored = torch.tensor(explored).bool(), torch.rand(5)
        weighed(exploration, scores, a=[2.0, 100.0, 100.0], b=[1.0, 7.0])

    expected = torch.tensor([[0.99 * 4, 0.99 * 50 + 1], [0.99, 0.99 * 2 + 1]])
    torch.testing.assert_close(exploration.sizes, expected)


def test_gradients_of_zero_stay_zero_and_missing_ones_change_nothing() -> None:
    exploration, scores = GateExploration(0.0, scaled=True), scores_of(a=2, b=1)
    exploration.begin(scores, 0)

    assert {} == weighed(exploration, scores)
    assert [[0.0, 0.0]] * 2 == exploration.sizes.tolist()
    found = weighed(exploration, scores, a=[0.0, 0.0], b=[0.0])

    assert ([0.0, 0.0], [0.0]) == (found["a"].tolist(), found["b"].tolist())


def test_sizes_go_on_over_epochs_and_begin_anew_for_other_groups() -> None:
    exploration, scores = GateExploration(0.0, scaled=True), scores_of(a=2, b=1)
    exploration.begin(scores, 0)
    weighed(exploration, scores, a=[3.0, 4.0], b=[2.0])

    exploration.begin(scores, 1)
    assert [25.0, 4.0] == exploration.sizes[0].tolist()
    exploration.begin(scores_of(a=2), 1)
    assert [[0.0], [0.0]] == exploration.sizes.tolist()
