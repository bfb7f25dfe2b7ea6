"""The certificate: on this architecture, removing these channels equals silencing them.

Both are carried out on copies in which every parameter and statistic is random (also those initialised to zero, so that
no symmetry hides a wrong index), in float64, and their outputs are compared. The check is shown to be non-vacuous: the
output moves with the input, and silencing moves the output.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn

from nni_prune_ext.errors import CertificateError, ModelError, NniPruneExtError
from nni_prune_ext.graph.channel_groups import ChannelGroups, trace_channel_groups
from nni_prune_ext.graph.state import untouched
from nni_prune_ext.inputs import ExampleInputs, call_model, cast_floats, random_like, tensors_in
from nni_prune_ext.plan import PruningPlan, plan_from_channels
from nni_prune_ext.surgery import Removal, cut_channels, silence_channels

BOUND_FLOAT64 = 1e-9
BOUND_FLOAT32 = 1e-4
FLOAT64_PARAMS = 150_000_000
"""Above this many parameters the copies are made in float32."""
_POOL = 1_000_003
"""Prime, so that no row length divides it and no two rows of a large matrix are equal."""


@dataclass(frozen=True)
class Certificate:
    """What was compared and how far apart the two were.

    Attributes:
        max_relative_error: largest |removed − silenced| over the probes, relative to the largest |silenced|.
        bound: the largest error allowed.
        probes: number of random inputs, each with its own random weights.
        seed: seed of weights and inputs.
        dtype: ``float64``, or ``float32`` above 150 M parameters.
        input_effect: smallest relative move of the output when the input changes.
        removal_effect: smallest relative move of the output when the channels are silenced.
    """

    max_relative_error: float
    bound: float
    probes: int
    seed: int
    dtype: str
    input_effect: float
    removal_effect: float

    @property
    def exact(self) -> bool:
        """Says whether removal is proven equal to silencing."""
        return self.flaw() is None

    def flaw(self) -> str | None:
        """Returns what is wrong, or ``None``."""
        if not self.max_relative_error <= self.bound:
            return f"removed and silenced differ by {self.max_relative_error:.1e}, allowed {self.bound:.0e}"
        if not self.input_effect > self.bound:
            return "the output does not move with the input, so nothing was shown"
        if not self.removal_effect > self.bound:
            return "silencing the channels does not move the output, so nothing was shown"
        return None

    def as_dict(self) -> dict[str, object]:
        """Returns all fields and the verdict, for reports."""
        return {**asdict(self), "exact": self.exact}


def remove_channels(
    model: nn.Module,
    plan: PruningPlan,
    example_inputs: ExampleInputs,
    *,
    groups: ChannelGroups | None = None,
    certify: bool = True,
    probes: int = 2,
    seed: int = 0,
) -> Removal:
    """Removes the planned channels from a copy of the model and certifies that this is exact.

    Args:
        groups: the traced groups, to save a second trace.
        certify: ``False`` skips the proof; ``Removal.certificate`` is then ``None``.

    Returns:
        the removal with its certificate; the given model is not changed.

    Raises:
        PlanError: the plan was made for another model.
        CertificateError: removal is not exact; nothing is returned.
    """
    groups = groups or trace_channel_groups(model, example_inputs)
    removal = cut_channels(model, plan, example_inputs, groups=groups)
    if not certify or not plan.num_removed:
        return removal
    certificate = certify_plan(model, plan, example_inputs, groups=groups, probes=probes, seed=seed)
    flaw = certificate.flaw()
    if flaw is not None:
        raise CertificateError(
            f"The plan cannot be carried out exactly: {flaw}. Protect the groups that are not exact "
            "(verify_groups finds them), then plan again."
        )
    return removal.certified(certificate)


def certify_plan(
    model: nn.Module,
    plan: PruningPlan,
    example_inputs: ExampleInputs,
    *,
    groups: ChannelGroups,
    probes: int = 2,
    seed: int = 0,
) -> Certificate:
    """Compares removal with silencing on randomised copies; see the module docstring.

    Raises:
        CertificateError: the compact copy does not run, or outputs differ in number or shape.
    """
    errors, input_effects, removal_effects = [], [], []
    for probe in range(probes):
        with _probe(model, example_inputs, seed * 1_000_003 + probe) as twin:
            error, effect = twin.compare(plan, groups)
            errors.append(error)
            removal_effects.append(effect)
            input_effects.append(twin.input_effect)
    dtype = _probe_dtype(model)
    return Certificate(
        max_relative_error=_worst(errors),
        bound=BOUND_FLOAT64 if dtype is torch.float64 else BOUND_FLOAT32,
        probes=probes,
        seed=seed,
        dtype=str(dtype).removeprefix("torch."),
        input_effect=min(input_effects),
        removal_effect=min(removal_effects),
    )


def verify_groups(
    model: nn.Module, example_inputs: ExampleInputs, groups: ChannelGroups, *, seed: int = 0
) -> ChannelGroups:
    """Tries every group on a copy and protects, with the reason, those whose removal fails or is not exact.

    About half of the channels of all groups are removed at once; only if that does not run, or is not exact, are the
    groups halved until the culprits are found.

    Returns:
        the groups, with the culprits moved to ``protected``.
    """
    reasons = {group.name: "has a single channel" for group in groups if group.num_channels == 1}

    def plan_for(names: list[str]) -> PruningPlan:
        generator = torch.Generator().manual_seed(seed)
        orders = {n: torch.randperm(groups[n].num_channels, generator=generator).numpy() for n in names}
        return plan_from_channels(groups, {n: order[: max(1, len(order) // 2)] for n, order in orders.items()})

    def search(flaw_of: Callable[[PruningPlan], str | None]) -> None:
        rest = [group.name for group in groups if group.name not in reasons]
        reasons.update(_culprits(rest, lambda names: flaw_of(plan_for(names))))
        rest = [name for name in rest if name not in reasons]
        while rest and (flaw := flaw_of(plan_for(rest))) is not None:
            reasons[rest.pop()] = f"not together with other groups: {flaw}"

    with untouched(model), _probe(model, example_inputs, seed) as twin:
        search(lambda plan: twin.failure(plan, groups))
        search(lambda plan: twin.flaw(plan, groups))
    return groups.protecting(reasons)


def _culprits(names: list[str], flaw_of: Callable[[list[str]], str | None]) -> dict[str, str]:
    flaw = flaw_of(names) if names else None
    if flaw is None:
        return {}
    if len(names) == 1:
        return {names[0]: flaw}
    middle = len(names) // 2
    return _culprits(names[:middle], flaw_of) | _culprits(names[middle:], flaw_of)


@dataclass(frozen=True)
class _Probe:
    """A randomised copy of the model with one input, and what it computes before any cut."""

    twin: nn.Module
    inputs: ExampleInputs
    dense: list[Tensor]
    input_effect: float
    bound: float

    def compare(self, plan: PruningPlan, groups: ChannelGroups) -> tuple[float, float]:
        """Returns the relative difference of removed to silenced, and of silenced to dense."""
        removed = _outputs(cut_channels(self.twin, plan, self.inputs, groups=groups).model, self.inputs)
        silent = _outputs(silence_channels(self.twin, plan, self.inputs, groups=groups), self.inputs)
        return _difference(removed, silent), _difference(self.dense, silent)

    def failure(self, plan: PruningPlan, groups: ChannelGroups) -> str | None:
        """Returns why the cut model does not run, or ``None``."""
        try:
            _outputs(cut_channels(self.twin, plan, self.inputs, groups=groups).model, self.inputs)
        except NniPruneExtError as error:
            return str(error)
        return None

    def flaw(self, plan: PruningPlan, groups: ChannelGroups) -> str | None:
        """Returns why the plan is not exact, or ``None``."""
        if not plan.num_removed:
            return None
        try:
            error, effect = self.compare(plan, groups)
        except NniPruneExtError as failure:
            return str(failure)
        return Certificate(error, self.bound, 1, 0, "", self.input_effect, effect).flaw()


@contextmanager
def _probe(model: nn.Module, example_inputs: ExampleInputs, seed: int) -> Iterator[_Probe]:
    dtype = _probe_dtype(model)
    generator = torch.Generator().manual_seed(seed)
    inputs = cast_floats(random_like(example_inputs, generator), dtype)
    others = cast_floats(random_like(example_inputs, generator), dtype)
    with randomised(model, inputs, dtype, generator) as twin:
        dense = _outputs(twin, inputs)
        effect = _difference(_outputs(twin, others), dense)
        yield _Probe(twin, inputs, dense, effect, BOUND_FLOAT64 if dtype is torch.float64 else BOUND_FLOAT32)


def _probe_dtype(model: nn.Module) -> torch.dtype:
    return torch.float32 if sum(p.numel() for p in model.parameters()) > FLOAT64_PARAMS else torch.float64


@contextmanager
def randomised(
    model: nn.Module, inputs: ExampleInputs, dtype: torch.dtype, generator: torch.Generator
) -> Iterator[nn.Module]:
    """Yields a copy of the model in evaluation mode with every float parameter and statistic random.

    Weights are scaled so that signals neither die nor explode; running statistics are those of the random activations,
    moved at random.
    """
    twin = copy.deepcopy(model).to(dtype).eval()
    fastpath = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.no_grad():
            pool = torch.randn(_POOL, generator=generator, dtype=torch.float64)
            for module in twin.modules():
                for key, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
                    if tensor.is_floating_point():
                        tensor.copy_(_random_values(module, key, tensor, pool, generator))
            _follow_statistics(twin, inputs, generator)
            yield twin
    finally:
        torch.backends.mha.set_fastpath_enabled(fastpath)


def _random_values(
    module: nn.Module, key: str, tensor: Tensor, pool: Tensor, generator: torch.Generator
) -> Tensor:
    """Draws values for one tensor from a pool of normal ones, each tensor from its own place."""
    shape = tuple(tensor.shape)
    start = int(torch.randint(_POOL, (1,), generator=generator))
    repeats = -(-(start + tensor.numel()) // _POOL)
    normal = pool.repeat(repeats)[start : start + tensor.numel()].reshape(shape)
    uniform = normal.abs().clamp(max=2.0) / 2
    if key.endswith("running_var"):
        return uniform + 0.5
    if tensor.dim() <= 1 or max(shape) == tensor.numel():
        return normal * 0.3 if "bias" in key or "mean" in key else uniform + 0.5
    fan_in = math.prod(shape[1:])
    if isinstance(module, (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)):
        fan_in = shape[0] * math.prod(shape[2:])
    return normal * math.sqrt(2.0 / fan_in)


def _follow_statistics(model: nn.Module, inputs: ExampleInputs, generator: torch.Generator) -> None:
    """Sets running statistics to those of the activations, moved at random, in one forward pass."""

    def follow(module: nn.Module, args: tuple[object, ...]) -> None:
        x, mean, var = args[0], module.running_mean, module.running_var
        if not isinstance(x, Tensor) or not isinstance(mean, Tensor) or not isinstance(var, Tensor) or x.dim() < 2:
            return
        dims = [0, *range(2, x.dim())]
        found = x.var(dims, unbiased=False) + 1e-2 * x.pow(2).mean() + 1e-6
        noise = torch.randn(mean.shape, generator=generator, dtype=torch.float64)
        mean.copy_(x.mean(dims) + 0.3 * noise.to(found) * found.sqrt())
        var.copy_(found * (torch.rand(mean.shape, generator=generator, dtype=torch.float64) + 0.5).to(found))

    with_statistics = [m for m in model.modules() if isinstance(getattr(m, "running_var", None), Tensor)]
    handles = [module.register_forward_pre_hook(follow) for module in with_statistics]
    try:
        call_model(model, inputs)
    finally:
        for handle in handles:
            handle.remove()


def _outputs(model: nn.Module, inputs: ExampleInputs) -> list[Tensor]:
    try:
        with torch.no_grad():
            return [tensor for tensor in tensors_in(call_model(model, inputs))]
    except ModelError as error:
        raise CertificateError(f"after the cut the forward pass fails: {error.__cause__}".split("\n")[0]) from error


def _difference(first: list[Tensor], second: list[Tensor]) -> float:
    """Returns the largest relative difference over all outputs; infinite where shapes differ or values are not finite."""
    if len(first) != len(second):
        return math.inf
    worst = 0.0
    for a, b in zip(first, second):
        if a.shape != b.shape or not bool(torch.isfinite(a).all()) or not bool(torch.isfinite(b).all()):
            return math.inf
        if not a.numel():
            continue
        if not a.is_floating_point():
            worst = math.inf if not torch.equal(a, b) else worst
            continue
        scale = float(b.abs().max())
        gap = float((a - b).abs().max())
        worst = max(worst, gap / scale if scale else (math.inf if gap else 0.0))
    return worst


def _worst(errors: list[float]) -> float:
    return math.nan if any(math.isnan(e) for e in errors) else max(errors)
