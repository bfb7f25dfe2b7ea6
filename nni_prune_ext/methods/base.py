"""The method contract: a small state machine that decides which channels go.

A method is driven by a loop (``nni_prune_ext.training.drive``) or by a host. It declares phases; in each phase the loop
trains what the phase names and calls the method's hooks; at the end the method hands over an :class:`Outcome`. How
data-free scores, losses with auxiliary modules, training-time controllers, mask searches and gated networks fit is
sketched in docs/explanation/method_contract.md.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, TypeAlias

from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn
from torch.optim import Optimizer

from nni_prune_ext.allocation import Allocation, Limits
from nni_prune_ext.gates import MeasuredGating
from nni_prune_ext.graph.channel_groups import ChannelGroups
from nni_prune_ext.inputs import ExampleInputs
from nni_prune_ext.plan import PruningPlan
from nni_prune_ext.surgery import Removal

Batch: TypeAlias = Any
"""One batch as the user's loader yields it; only the user's loss looks inside."""

Product = Literal["plan", "weight_masks", "gated_model"]
Unit = Literal["channel", "weight"]
JsonState: TypeAlias = dict[str, "float | int | str | list[float] | dict[str, float]"]


@dataclass(frozen=True)
class Phase:
    """A stretch of training with one set of trainable parameters.

    Attributes:
        name: unique within the method, shown in progress and logs.
        epochs: how many epochs; 0 runs the hooks only.
        trainable: which of the model's parameters (by name) are trained; ``None`` leaves ``requires_grad`` as it is. If
            it names none and the method has no optimizer, batches only run forward: for statistics.
        optimizers: makes the method's own optimizers for this phase; they keep the learning rates that they are
            given. The loop's own takes every trainable parameter of the model that none of them holds.
        learning_rate_scale: factor on the loop's learning rate.
    """

    name: str
    epochs: int = 0
    trainable: Callable[[str], bool] | None = None
    optimizers: Callable[[MethodContext], Sequence[Optimizer]] | None = None
    learning_rate_scale: float = 1.0


@dataclass(frozen=True)
class Outcome:
    """What a method has decided.

    Attributes:
        plan: channels still to be removed, in the coordinates of the model that the context holds at the end.
        weight_masks: tensor name → bool mask of its shape, ``True`` = kept (unstructured or N:M); ``None`` if there
            are none.
        gated_model: a network whose channels are switched per input, where that is the product. It holds a copy of the
            model that the context holds at the end: a method cuts first (``context.apply``) and leaves ``plan`` empty.
        facts: numbers worth a line in the report.
        pictures: what each shows → ``(C, H, W)`` uint8 with 1 or 3 channels, for the report.
        gating: what the gated model costs and how its filters fire on the images that the method calibrated on; a
            report without test images shows it.
    """

    plan: PruningPlan
    weight_masks: Mapping[str, Tensor] | None = None
    gated_model: nn.Module | None = None
    facts: Mapping[str, float] = field(default_factory=dict)
    pictures: Mapping[str, Tensor] = field(default_factory=dict)
    gating: MeasuredGating | None = None


class MethodContext(Protocol):
    """What a loop offers to a method. Everything here is also what a method may rely on inside NNI."""

    model: nn.Module
    """The network; replaced by ``apply``."""
    groups: ChannelGroups
    """Its prunable channel groups."""
    example_inputs: ExampleInputs
    progress: float
    """Share of all epochs of the method that are done, 0–1."""
    seed: int
    limits: Limits
    """What no plan may exceed; ``allocate`` keeps to them by itself."""

    @property
    def unit(self) -> Unit:
        """What was asked for: channels to be removed, or single weights to be masked."""

    @property
    def maskable(self) -> tuple[str, ...]:
        """The parameters whose single weights may be masked, in the order of registration; empty for channels."""

    def batches(self, count: int) -> list[Batch]:
        """Returns ``count`` training batches outside the loop; the loop's own order does not move."""

    def task_loss(self, batch: Batch) -> Tensor:
        """Returns the user's loss of the model on a batch, a scalar with gradient."""

    def allocate(
        self, scores: Mapping[str, Tensor], *, fraction: float = 1.0, ratios: Mapping[str, float] | None = None
    ) -> Allocation:
        """Turns scores into a plan on the way to the targets (``nni_prune_ext.allocation.allocate``)."""

    def masked_counts(self, magnitudes: Mapping[str, Tensor], *, fraction: float = 1.0) -> Mapping[str, int]:
        """Says how many single weights of each tensor are to be masked, given magnitudes of all that may be.

        ``fraction`` (0–1) of the sparsity that was asked for.
        """

    def agreed(self, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Returns the means over all processes: what a method decides from these is decided everywhere alike."""

    def apply(self, plan: PruningPlan) -> Removal:
        """Removes channels now, certified: the model, its optimizers and everything that follows are cut alike."""

    def rewind(self, state: Mapping[str, Tensor]) -> None:
        """Loads weights of the original model into the current one, cut like it."""

    def on_leave(self, undo: Callable[[], object]) -> None:
        """Calls ``undo`` when the phase ends, however it ends, or before a cut: for hooks on the model."""

    def log(self, values: Mapping[str, float]) -> None:
        """Notes numbers for the report."""


class PruningMethod:
    """Base of all methods: every hook does nothing, ``phases`` and ``finish`` must be written.

    A method's constructor takes its configuration and stores it; work happens in the hooks.
    """

    def phases(self) -> Sequence[Phase]:
        """Returns the phases in order; at least one."""
        raise NotImplementedError

    def finish(self, context: MethodContext) -> Outcome:
        """Hands over what was decided, after the last phase."""
        raise NotImplementedError

    def start(self, context: MethodContext, phase: Phase) -> None:
        """Is called once at the beginning of every phase: makes state, plans, cuts. Not when a phase is continued.

        Modes and trainable parameters are set before.
        """

    def attach(self, context: MethodContext, phase: Phase) -> None:
        """Puts onto ``context.model`` what the phase needs and no state holds: hooks and training modes.

        Is called after ``start``, after every cut within the phase, and instead of ``start`` when a run is continued
        within the phase. Every hook comes with ``context.on_leave(handle.remove)``.
        """

    def compute_loss(self, context: MethodContext, batch: Batch) -> Tensor:
        """Returns the loss to minimise on a batch; the user's task loss unless overridden."""
        return context.task_loss(batch)

    def after_backward(self, context: MethodContext) -> None:
        """Is called with gradients present, before the optimizers step."""

    def after_step(self, context: MethodContext) -> None:
        """Is called after the optimizers have stepped."""

    def after_epoch(self, context: MethodContext, phase: Phase, epoch: int) -> None:
        """Is called at the end of every epoch of a phase (0-based)."""

    def on_removed(self, context: MethodContext, removal: Removal) -> None:
        """Is told about every cut, so that scores, moments, masks and auxiliary modules follow (``removal.kept``).

        Hooks were taken off before the cut; ``attach`` is called next.
        """

    def state_dict(self) -> tuple[dict[str, Tensor], JsonState]:
        """Returns everything needed to continue after any epoch, or to ``finish``: tensors and JSON values."""
        return {}, {}

    def load_state_dict(self, tensors: Mapping[str, Tensor], values: JsonState) -> None:
        """Restores what ``state_dict`` returned."""


class NoOptions(BaseModel):
    """The configuration of a method without options."""

    model_config = ConfigDict(frozen=True, extra="forbid")


@dataclass(frozen=True)
class MethodSpec:
    """What is registered under ``nni_prune_ext.pruners``: declared facts and a way to build the method.

    Attributes:
        name: the registered name.
        summary: one sentence for listings.
        reference: paper or page.
        options: pydantic model of the method's configuration.
        build: makes a fresh method from its configuration.
        needs_data: whether training batches are required.
        own_optimizers: whether some phase makes optimizers of its own.
        changes_structure: whether channels may be cut before the end, with some options.
        products: what ``Outcome`` may hold; a method with plans and weight masks hands over what was asked for.
        scores: importance of every channel of every group, higher = keep, where the method is a criterion. Hosts with
            a schedule of their own (NNI's pruners, torch-pruning's ``BasePruner``) call it as often as they like. It
            looks at ``model``, ``groups``, ``seed``, ``batches`` and ``task_loss`` of the context, and changes nothing.
        score_options: the options that ``scores`` depends on.
        build_gated: builds the gated network around a compact model with the same configuration and example inputs, and
            with the tensors of the artefact to read sizes from; its weights are then loaded. Needed where ``products``
            names a gated model.
        demo_options: configuration for a run of about ten seconds on a small network.
    """

    name: str
    summary: str
    reference: str
    options: type[BaseModel]
    build: Callable[[Any], PruningMethod]
    needs_data: bool = False
    own_optimizers: bool = False
    changes_structure: bool = False
    products: frozenset[Product] = frozenset({"plan"})
    scores: Callable[[MethodContext, Any], Mapping[str, Tensor]] | None = None
    score_options: frozenset[str] = frozenset()
    build_gated: Callable[[nn.Module, Any, ExampleInputs, Mapping[str, Tensor]], nn.Module] | None = None
    demo_options: Mapping[str, object] = field(default_factory=dict)
