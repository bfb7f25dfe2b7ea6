"""The user's training as NNI's evaluator holds it: batches seen on the way, the loss once more on any model, one epoch.

NNI's TorchEvaluator gives no loader and no loss, only a training function that calls a training step. What a step was
called with is remembered, so that the step can be called again on another model. This file alone looks at private parts
of NNI's evaluator.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from nni.compression import TorchEvaluator
from nni.compression.base.compressor import Pruner
from nni.compression.base.wrapper import ModuleWrapper
from nni.compression.utils.evaluator import Evaluator, ModuleHook
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from nni_prune_ext.errors import ConfigError
from nni_prune_ext.inputs import tensors_in
from nni_prune_ext.methods.base import PruningMethod
from nni_prune_ext.training import MethodRun

Step = Callable[..., Any]  # the user's training step: NNI leaves its arguments to the user


@dataclass(frozen=True)
class _ModelPlace:
    """Stands in remembered arguments where the model was."""


@dataclass(frozen=True)
class _OutputPlace:
    """Stands in remembered arguments where the model's output was, or one of its tensors (by number)."""

    number: int | None


@dataclass(frozen=True)
class StepCall:
    """One call of the user's training step, ready to be repeated on any model of the same inputs."""

    step: Step
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    model_args: tuple[Any, ...]
    model_kwargs: Mapping[str, Any]

    def loss(self, model: nn.Module) -> Tensor:
        """Returns the loss of a model on this call's batch."""
        given = [*self.args, *self.kwargs.values()]
        needed = any(isinstance(item, _OutputPlace) for item in given)
        output = model(*self.model_args, **self.model_kwargs) if needed else None
        tensors = list(tensors_in(output))

        def filled(item: Any) -> Any:
            if isinstance(item, _ModelPlace):
                return model
            if isinstance(item, _OutputPlace):
                return output if item.number is None else tensors[item.number]
            return item

        return loss_of(self.step(*map(filled, self.args), **{key: filled(item) for key, item in self.kwargs.items()}))


def loss_of(result: Any) -> Tensor:
    """Returns the loss in what a training step returned: the tensor, the first of a sequence, or under ``loss``."""
    if isinstance(result, Mapping):
        return cast("Tensor", result["loss"])
    return cast("Tensor", result[0] if isinstance(result, Sequence) else result)


def with_loss(result: Any, loss: Tensor) -> Any:
    """Returns what a training step returned with another loss in its place."""
    if isinstance(result, Mapping):
        return {**result, "loss": loss}
    return (loss, *result[1:]) if isinstance(result, Sequence) else loss


class StepRecorder:
    """Remembers the last calls of the training step of an evaluator that is bound to a model, until it is unbound.

    Attributes:
        calls: the newest ``count`` calls, oldest first.
        seen: how many there were.
    """

    def __init__(self, evaluator: TorchEvaluator, count: int) -> None:
        self.calls: deque[StepCall] = deque(maxlen=max(count, 1))
        self.seen = 0
        self._evaluator = evaluator
        self._forward = _LastForward(evaluator.model)
        evaluator.register_hooks([self._forward])
        self._original, evaluator._training_step = evaluator._training_step, self._record

    def _record(self, *args: Any, **kwargs: Any) -> Any:
        forward = self._forward
        places: dict[int, object] = {id(t): _OutputPlace(n) for n, t in enumerate(tensors_in(forward.output))}
        if forward.output is not None:
            places.setdefault(id(forward.output), _OutputPlace(None))
        places[id(self._evaluator.model)] = _ModelPlace()
        kept = tuple(places.get(id(item), item) for item in args)
        kept_by_key = {key: places.get(id(item), item) for key, item in kwargs.items()}
        inputs = forward.inputs
        result = self._original(*args, **kwargs)
        repeatable = any(isinstance(item, (_ModelPlace, _OutputPlace)) for item in [*kept, *kept_by_key.values()])
        if not repeatable:
            raise ConfigError(
                "The training_step of the evaluator is called with neither the model nor its output among its "
                f"arguments ({', '.join(type(item).__name__ for item in args)}), so its loss cannot be computed again. "
                "Expected training_step(batch, model). Pass the model as an argument."
            )
        self.calls.append(StepCall(self._original, kept, kept_by_key, *inputs))
        self.seen += 1
        return result


class _LastForward(ModuleHook):  # type: ignore[misc]
    """NNI's kind of hook that keeps what a model was called with and what came out, until the evaluator is unbound."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model, "model", lambda buffer: self._keep)
        self.inputs: tuple[tuple[Any, ...], Mapping[str, Any]] = ((), {})
        self.output: Any = None

    def remove(self) -> None:
        """Takes the hook off and lets go of what it kept."""
        super().remove()
        self.inputs, self.output = ((), {}), None

    def _register(self, hook_func: Callable[..., None]) -> RemovableHandle:
        return cast("RemovableHandle", self.target.register_forward_hook(hook_func, with_kwargs=True))

    def _keep(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> None:
        self.inputs, self.output = (args, kwargs), output


def torch_evaluator(evaluator: Evaluator | None, needed_for: str) -> TorchEvaluator:
    """Returns the evaluator if it is one whose steps can be repeated.

    Raises:
        ConfigError: there is none, or it is of another kind.
    """
    if isinstance(evaluator, TorchEvaluator):
        return evaluator
    found = "no evaluator" if evaluator is None else f"a {type(evaluator).__name__}"
    raise ConfigError(
        f"{needed_for} needs training batches, but has {found}; expected an nni.compression.TorchEvaluator. Pass "
        "evaluator=TorchEvaluator(training_func, optimizer, training_step)."
    )


@contextmanager
def bound(evaluator: Evaluator, model: nn.Module, names: Mapping[str, str] | None) -> Iterator[None]:
    """Binds an evaluator to a model and lets it go again, also when training raises."""
    evaluator.bind_model(model, None if names is None else dict(names))
    try:
        yield
    finally:
        evaluator.unbind_model()


def collected_calls(evaluator: TorchEvaluator, model: nn.Module, count: int) -> list[StepCall]:
    """Returns the first calls of the training step on a model that is used up: it is trained on the way.

    Raises:
        ConfigError: the training function made no step, or its steps cannot be repeated.
    """
    with bound(evaluator, model, None):
        recorder = StepRecorder(evaluator, count)
        evaluator.train(max_steps=count)
    if not recorder.seen:
        raise ConfigError(
            f"The training_func of the evaluator made no step when asked for max_steps={count}, expected {count}. Make "
            "it call training_step, and stop after max_steps."
        )
    return list(recorder.calls)


class EvaluatorTraining:
    """Trains a method's model with the user's training function, epoch by epoch; the evaluator is bound all the while.

    After a cut the evaluator is bound to the compact model: learning rates go on where they were, momentum begins anew.
    """

    def __init__(self, evaluator: TorchEvaluator) -> None:
        self.evaluator = evaluator
        self._own: list[list[list[nn.Parameter]]] = []  # optimizer → group → what it was made for

    def close(self) -> None:
        """Lets the evaluator go."""
        if self.evaluator.model is not None:
            self.evaluator.unbind_model()

    def epoch(self, run: MethodRun, method: PruningMethod) -> list[Tensor]:
        """Trains one epoch with the method's hooks around every step; returns the loss of every step."""
        evaluator, losses = self.evaluator, list[Tensor]()
        self._bind(run)
        zero = torch.zeros((), device=next(run.model.parameters()).device, requires_grad=True)
        original, result = evaluator._training_step, None

        def noted(*args: Any, **kwargs: Any) -> Any:
            nonlocal result
            result = original(*args, **kwargs)
            return result

        def step(*args: Any, **kwargs: Any) -> Any:
            loss = method.compute_loss(run, StepCall(noted, args, kwargs, (), {}))
            losses.append(loss.detach())
            return with_loss(result, loss if loss.requires_grad else loss + 0 * zero)  # the user's loop calls backward

        def before() -> None:
            method.after_backward(run)
            for optimizer in run.optimizers:
                optimizer.step()

        def after() -> None:
            for optimizer in run.optimizers:
                optimizer.zero_grad(set_to_none=True)
            method.after_step(run)

        def stepped(*args: Any, **kwargs: Any) -> Any:
            returned = plain(*args, **kwargs)
            after()
            return returned

        evaluator._training_step = step
        last = evaluator._optimizers[-1]
        plain = last.step
        if last is not evaluator._optimizers[0]:  # NNI patches the first one only
            last.step = stepped
        evaluator.patch_optimizer_step([before], [after] if last is evaluator._optimizers[0] else [])
        try:
            evaluator.train(max_epochs=1)
        finally:
            last.step = plain
            evaluator.revert_loss()
            evaluator.revert_optimizer_step()
        if not losses:
            raise ConfigError(
                "The training_func of the evaluator made no step when asked for max_epochs=1. Expected one epoch. "
                "Make it call training_step on every batch, and heed max_epochs."
            )
        return losses

    def _bind(self, run: MethodRun) -> None:
        """Binds the evaluator to the model of now; its optimizers leave out what the method's optimizers hold."""
        evaluator = self.evaluator
        if evaluator.model is not run.model:
            self._bind_anew(run)
            self._own = [[list(group["params"]) for group in one.param_groups] for one in evaluator._optimizers]
        held = {id(p) for optimizer in run.optimizers for group in optimizer.param_groups for p in group["params"]}
        for optimizer, groups in zip(evaluator._optimizers, self._own):
            for group, own in zip(optimizer.param_groups, groups):
                group["params"] = [p for p in own if id(p) not in held]

    def _bind_anew(self, run: MethodRun) -> None:
        evaluator = self.evaluator
        schedules = [] if evaluator.model is None else [s.state_dict() for s in evaluator._lr_schedulers]
        self.close()
        evaluator.bind_model(run.model, None)
        for schedule, state in zip(evaluator._lr_schedulers, schedules):
            schedule.load_state_dict(state)
            for group, rate in zip(schedule.optimizer.param_groups, schedule.get_last_lr()):
                group["lr"] = rate


@contextmanager
def released(evaluator: Evaluator) -> Iterator[None]:
    """Lets an evaluator go at the end of a ``with`` block: NNI leaves it bound when training raises."""
    try:
        yield
    finally:
        if getattr(evaluator, "model", None) is not None:
            evaluator.unbind_model()


def untrained(evaluator: Evaluator, model: nn.Module) -> list[str]:
    """Returns the trainable parameters, by their names before wrapping, that no optimizer of the evaluator holds."""
    if not isinstance(evaluator, TorchEvaluator) or not evaluator._initialization_complete:
        return []
    held: set[str] = set()
    for helper in evaluator._optimizer_helpers:
        groups = helper.kwargs["params"] if "params" in helper.kwargs else helper.args[0]
        held |= {name for group in groups for name in group["params"]}
    plain = {name.replace("_nni_wrapper.", ""): p for name, p in model.named_parameters()}
    return [name for name, parameter in plain.items() if parameter.requires_grad and name not in held]


def adopt_parameters(evaluator: Evaluator, pruner: Pruner) -> None:
    """Makes a model that NNI has unwrapped hold again the parameters that the user's optimizers hold.

    NNI replaces the parameters of pruned layers by copies; an evaluator that was not initialised before then finds none
    of them in its optimizers and trains nothing. A copy is known by its shape and values. Parameters that are equal
    (zero biases) are told apart by nothing, so they must be optimized alike.

    Raises:
        ConfigError: a parameter of an optimizer is not the model's, or equal ones are optimized differently.
    """
    if evaluator._initialization_complete or not isinstance(evaluator, TorchEvaluator):
        return
    own = {id(parameter) for parameter in pruner.bound_model.parameters()}
    places = [
        (pruner._module_wrappers[name].module, key) for name, keys in pruner._target_spaces.items() for key in keys
    ]
    open_places = [(module, key) for module, key in places if module._parameters.get(key) is not None]
    groups = [group["params"] for optimizer in evaluator._tmp_optimizers for group in optimizer.param_groups]
    lost = [(number, p) for number, group in enumerate(groups) for p in group if id(p) not in own]
    while lost:
        first = lost[0][1]
        alike = [(number, p) for number, p in lost if _equal(p, first)]
        lost = [(number, p) for number, p in lost if not _equal(p, first)]
        fitting = [(module, key) for module, key in open_places if _equal(module._parameters[key], first)]
        if not fitting:
            raise ConfigError(
                f"The optimizer of the evaluator holds a parameter of shape {tuple(first.shape)} that "
                f"{type(pruner.bound_model).__name__} does not have, expected the parameters of this model. Make the "
                "optimizer from the model that is pruned, or pass the evaluator to the inner pruner."
            )
        if len(fitting) != len(alike) or len({number for number, _ in alike}) > 1:
            raise ConfigError(
                f"{len(fitting)} pruned parameters of shape {tuple(first.shape)} have equal values, but are optimized "
                "differently, so it cannot be told which is which once NNI has replaced them. Expected one parameter "
                f"group for them. Pass the evaluator to the inner pruner: {type(pruner).__name__}(…, evaluator)."
            )
        for (module, key), (_, parameter) in zip(fitting, alike):
            module._parameters[key] = parameter


def _equal(first: Tensor | None, second: Tensor) -> bool:
    return first is not None and first.shape == second.shape and torch.equal(first.detach(), second.detach())


def first_weights(model: nn.Module) -> list[tuple[Tensor, Tensor]]:
    """Returns all parameters and statistics of a wrapped model, each with a copy; masks are none of them."""
    found: dict[int, Tensor] = {}
    for module in model.modules():
        buffers = [] if isinstance(module, ModuleWrapper) else module._buffers.values()
        found |= {id(own): own for own in (*module._parameters.values(), *buffers) if own is not None}
    return [(own, own.detach().clone()) for own in found.values()]


def rewind(first: Sequence[tuple[Tensor, Tensor]], evaluator: Evaluator) -> None:
    """Loads the copies again, and lets the evaluator's optimizers begin anew."""
    with torch.no_grad():
        for own, copied in first:
            own.copy_(copied)
    for optimizer in evaluator._optimizers or ():
        optimizer.state.clear()
