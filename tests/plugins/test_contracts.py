"""Every registered plugin keeps the promises of its kind; the registry says which there are."""

from __future__ import annotations

import pytest

from nni_prune_ext.methods.base import MethodSpec
from nni_prune_ext.registry import load_plugin, plugins
from nni_prune_ext.runtimes.base import InferenceRuntime, RunnableModel
from nni_prune_ext.schedules import SchedulerSpec
from nni_prune_ext.testing import check_method, check_runtime, check_scheduler


@pytest.mark.parametrize("name", plugins("pruners"))
def test_every_registered_method_keeps_its_promises(name: str) -> None:
    spec = load_plugin("pruners", name)

    assert isinstance(spec, MethodSpec)
    assert name == spec.name
    check_method(spec)


@pytest.mark.parametrize("name", plugins("schedulers"))
def test_every_registered_scheduler_keeps_its_promises(name: str) -> None:
    spec = load_plugin("schedulers", name)

    assert isinstance(spec, SchedulerSpec)
    check_scheduler(spec)


@pytest.mark.parametrize("name", plugins("runtimes"))
def test_every_registered_runtime_keeps_its_promises(name: str, tiny: RunnableModel) -> None:
    runtime: InferenceRuntime = load_plugin("runtimes", name)()

    assert name == runtime.name
    check_runtime(runtime, tiny)


@pytest.mark.parametrize(
    "name", [n for n in plugins("pruners") if "steps" in load_plugin("pruners", n).options.model_fields]
)
def test_methods_that_work_in_steps_keep_their_promises_with_training_between(name: str) -> None:
    spec = load_plugin("pruners", name)

    check_method(spec, options={"steps": 2, "schedule": "agp", "epochs_per_step": 1, "ratio_policy": "uniform_ratio"})
