"""How often a method cuts for a latency, and which of its networks is kept: on an aim that says what it is told to."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest

from nni_prune_ext.method_cut import cut_to_latency


@dataclass
class Aim:
    """Says which cuts miss the target, and how far off the judged ones are; remembers what it goes back to."""

    misses: list[bool]
    distances: list[float]
    corrects: bool = False
    used: list[str] = field(default_factory=list)

    def missed_by(self, method: str, plan: object, network: str) -> bool:
        return self.misses.pop(0)

    def final(self, network: str, *, trained: bool) -> SimpleNamespace:
        assert not trained
        return SimpleNamespace(distance=(False, self.distances.pop(0)), network=network)

    def should_correct(self, evidence: object, network: str) -> bool:
        return self.corrects

    def use(self, predictor: str) -> None:
        self.used.append(predictor)


def kept(aim: Aim) -> tuple[str, str, list[str]]:
    """Returns the network that is kept, the one that its evidence is about, and all that were made."""
    made: list[str] = []

    def cut() -> SimpleNamespace:
        made.append(f"network {len(made)}")
        return SimpleNamespace(plan=None, network=made[-1], run=SimpleNamespace(latency=f"predictor of {made[-1]}"))

    chosen, evidence = cut_to_latency("l1", cut, aim)
    return chosen.network, evidence.network, made


def test_a_network_that_misses_is_cut_again_and_only_the_one_that_does_not_is_judged() -> None:
    aim = Aim(misses=[True, True, False], distances=[0.01])

    assert ("network 2", "network 2", ["network 0", "network 1", "network 2"]) == kept(aim)
    assert ["predictor of network 2"] == aim.used


@pytest.mark.parametrize(("distances", "nearer"), [([0.2, 0.1], "network 1"), ([0.1, 0.2], "network 0")])
def test_a_last_measurement_that_misses_leads_to_one_more_cut_and_the_nearer_one_is_kept(
    distances: list[float], nearer: str
) -> None:
    aim = Aim(misses=[False, False], distances=distances, corrects=True)

    assert (nearer, nearer, ["network 0", "network 1"]) == kept(aim)
    assert [f"predictor of {nearer}"] == aim.used


def test_a_last_measurement_that_meets_the_target_ends_it() -> None:
    assert ("network 0", "network 0", ["network 0"]) == kept(Aim(misses=[False], distances=[0.0]))
