"""Carries a measurement out: every network on every runtime, parity and accuracy before any latency."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from nni_prune_ext.data.batches import split_batches
from nni_prune_ext.data.image_arrays import DataSource
from nni_prune_ext.errors import ConfigError, ModelError, RuntimeUnavailableError
from nni_prune_ext.evaluation import environment, measure_latency, throughput
from nni_prune_ext.evidence.fresh_process import FreshRuns, FreshTask, measure_fresh
from nni_prune_ext.evidence.networks import EvidenceNetwork, common_shape
from nni_prune_ext.evidence.parity import ParityCount, reference_outputs
from nni_prune_ext.evidence.results import Conditions, Evidence, NotMeasured, OutputParity, Timing
from nni_prune_ext.export.onnx_inputs import written_shape
from nni_prune_ext.runtimes.base import Array, InferenceRuntime, RunnableModel

NUM_INPUTS = 8
"""Different inputs that the rounds rotate over."""
QUALITY_BATCH = 100
"""Images per run while accuracy and parity are measured, where the batch is open."""

_Value = TypeVar("_Value")
Images = npt.NDArray[np.float32]
Labelled = tuple[Images, npt.NDArray[np.int64] | None]


@dataclass(frozen=True)
class Building:
    """How a fresh process makes what this process has: options of runtimes, and how models are built and placed."""

    runtime_options: Mapping[str, Mapping[str, object]] = field(default_factory=dict)
    model: str | None = None
    device: str = "cpu"


def collect_evidence(
    networks: Sequence[EvidenceNetwork],
    runtimes: Mapping[str, InferenceRuntime],
    conditions: Conditions | None = None,
    *,
    source: DataSource | None = None,
    building: Building | None = None,
    progress: Callable[[str], None] | None = None,
    fresh: Callable[[FreshTask, int], FreshRuns] = measure_fresh,
) -> Evidence:
    """Measures every network on every runtime; what cannot be measured is in the result, with its reason.

    Args:
        networks: see ``read_networks``; the first one is the reference.
        runtimes: by registered name.
        source: its test images are the inputs, and accuracy is measured on all of them; seeded noise by default.
        building: what a fresh process has to know.
        progress: is told what is being done.
        fresh: runs a task in so many processes.

    Raises:
        ConfigError: the networks, the batch sizes and the images do not fit together; CPU time with several threads.
    """
    conditions, building = conditions or Conditions(), building or Building()
    if conditions.clock == "cpu" and conditions.threads != 1:
        raise ConfigError(
            f"CPU time was asked for with {conditions.threads} threads, but it counts one thread only. Expected one "
            "thread. Take --threads 1, or --clock wall."
        )
    shape = common_shape(networks, conditions.batches)
    work = _Work(networks, conditions, shape, source, building, progress or (lambda _: None), fresh)
    work.check_images()
    for name, chosen in runtimes.items():
        work.measure(name, chosen)
    return work.evidence()


@dataclass(frozen=True)
class _Quality:
    """What a network is worth on a runtime, and in which form the runtime took it."""

    source: RunnableModel
    accuracy: float | None
    parity: OutputParity | None


class _Work:
    """One measurement under way."""

    def __init__(
        self,
        networks: Sequence[EvidenceNetwork],
        conditions: Conditions,
        shape: tuple[int | None, ...],
        source: DataSource | None,
        building: Building,
        progress: Callable[[str], None],
        fresh: Callable[[FreshTask, int], FreshRuns],
    ) -> None:
        self._networks = networks
        self._conditions = conditions
        self._shape = shape
        self._source = source
        self._building = building
        self._progress = progress
        self._fresh = fresh
        self._references: dict[str, list[list[Array]]] = {}
        self._timings: list[Timing] = []
        self._accuracy: dict[str, dict[str, float]] = {}
        self._parity: dict[str, dict[str, OutputParity]] = {}
        self._fresh_runs: dict[str, dict[str, FreshRuns]] = {}
        self._missing: list[NotMeasured] = []

    def check_images(self) -> None:
        """Refuses images that do not fit the networks or the batch sizes, before anything is measured.

        Raises:
            ConfigError: they do not.
        """
        self._inputs = {size: self._inputs_of(size) for size in dict.fromkeys(self._conditions.batches)}
        fixed = self._shape[0]
        if self._source is not None and fixed and len(self._source.test) % fixed:
            raise ConfigError(
                f"The networks take a batch of {fixed} only, and the {len(self._source.test)} test images are no "
                "multiple of it: accuracy would leave some out. Export with an open batch, or leave out --data."
            )

    def measure(self, name: str, runtime: InferenceRuntime) -> None:
        """Measures all networks that a runtime takes; notes the reason for what it does not take."""
        availability = runtime.availability()
        if not availability.usable:
            self._missing.append(NotMeasured(name, availability.reason))
            return
        usable: dict[str, _Quality] = {}
        for network in self._networks:
            self._progress(f"{name}: comparing {network.name} with PyTorch")
            try:
                usable[network.name] = self._quality(network, runtime)
            except (RuntimeUnavailableError, ModelError) as error:  # it fell back, or the form that it takes is missing
                self._missing.append(NotMeasured(name, str(error), network.name))
        if not usable:
            return
        try:
            timings = [self._timed(name, runtime, usable, arrays) for arrays in self._inputs.values()]
        except (RuntimeUnavailableError, ModelError, ConfigError) as error:  # at another batch size, or another clock
            self._missing += [NotMeasured(name, str(error), network) for network in usable]
            return
        self._timings += timings
        self._accuracy[name] = {own: found.accuracy for own, found in usable.items() if found.accuracy is not None}
        self._parity[name] = {own: found.parity for own, found in usable.items() if found.parity is not None}
        if self._conditions.fresh:
            self._fresh_runs[name] = dict(self._cold(name, usable))

    def evidence(self) -> Evidence:
        """Returns what was found so far."""
        return Evidence(
            networks=self._networks,
            conditions=self._conditions,
            environment=environment(),
            input_shape=self._shape,
            data=self._source.name if self._source else None,
            timings=self._timings,
            accuracy=_filled(self._accuracy),
            parity=_filled(self._parity),
            fresh=_filled(self._fresh_runs),
            not_measured=self._missing,
        )

    def _inputs_of(self, size: int) -> list[Images]:
        """Returns different inputs of one batch size: images of the data, or seeded normal numbers."""
        shape = tuple(int(length or 0) for length in self._shape[1:])
        if self._source is None:
            draws = np.random.default_rng(self._conditions.seed)
            return [draws.standard_normal((size, *shape), dtype=np.float32) for _ in range(NUM_INPUTS)]
        if self._source.input_shape != shape:
            raise ConfigError(
                f"The images of '{self._source.name}' are {written_shape((None, *self._source.input_shape))}, expected "
                f"{written_shape(self._shape)} as the networks take. Set --image-size, or choose other --data."
            )
        batches = islice(split_batches(self._source, "test", size), NUM_INPUTS)
        whole = [images.numpy() for images, _ in batches if len(images) == size]
        if not whole:
            raise ConfigError(
                f"The test split of '{self._source.name}' has {len(self._source.test)} images, expected at least "
                f"--batch {size}. Ask for a smaller batch, or raise --limit-images."
            )
        return whole

    def _labelled(self) -> Iterator[Labelled]:
        """Yields all test images with their labels, or the made-up inputs of the first batch size without any."""
        if self._source is None:
            yield from ((images, None) for images in self._inputs[self._conditions.batches[0]])
            return
        for images, labels in split_batches(self._source, "test", self._shape[0] or QUALITY_BATCH):
            yield images.numpy(), labels.numpy()

    def _quality(self, network: EvidenceNetwork, runtime: InferenceRuntime) -> _Quality:
        """Runs all images on a runtime, in the form of the network that it takes.

        Raises:
            ModelError: it takes none of the forms that are there.
            RuntimeUnavailableError: it fell back.
        """
        try:
            return self._quality_of(network, runtime, RunnableModel(onnx_path=network.onnx_path))
        except ModelError as error:
            if network.module is None:
                raise ModelError(f"{error} {network.no_module}.") from error
            try:
                return self._quality_of(network, runtime, RunnableModel(module=network.module))
            except ModelError:
                raise error from None  # it takes ONNX files, and not this one

    def _quality_of(self, network: EvidenceNetwork, runtime: InferenceRuntime, source: RunnableModel) -> _Quality:
        correct = total = 0
        parity = ParityCount()
        precision, threads = self._conditions.precision, self._conditions.threads
        with runtime.session(source, threads=threads, precision=precision) as session:
            for number, (images, labels) in enumerate(self._labelled()):
                outputs = session.run([images])
                if labels is not None:
                    correct += int((np.asarray(outputs[0], np.float64).argmax(axis=1) == labels).sum())
                    total += len(labels)
                if network.module is not None:
                    parity.add(self._reference(network)[number], outputs)
        return _Quality(source, correct / total if total else None, parity.result())

    def _reference(self, network: EvidenceNetwork) -> list[list[Array]]:
        """Returns what PyTorch computes for every batch of images; computed once per network."""
        if network.name not in self._references:
            assert network.module is not None
            batches = (images for images, _ in self._labelled())
            self._references[network.name] = reference_outputs(network.module, batches)
        return self._references[network.name]

    def _timed(
        self, name: str, runtime: InferenceRuntime, usable: Mapping[str, _Quality], inputs: Sequence[Images]
    ) -> Timing:
        options = self._conditions
        self._progress(f"{name}: measuring {len(usable)} networks at batch {len(inputs[0])}")
        latency = measure_latency(
            {own: (runtime, found.source) for own, found in usable.items()},
            [[array] for array in inputs],
            rounds=options.rounds,
            min_seconds=options.seconds,
            threads=options.threads,
            clock=options.clock,
            precision=options.precision,
            seed=options.seed,
        )
        through = {
            own: throughput(
                runtime,
                found.source,
                [inputs[0]],
                min_seconds=options.seconds,
                threads=options.threads,
                precision=options.precision,
            )
            for own, found in usable.items()
        }
        return Timing(name, latency, through)

    def _cold(self, name: str, usable: Mapping[str, _Quality]) -> Iterator[tuple[str, FreshRuns]]:
        options = self._conditions
        for network in self._networks:
            if network.name not in usable:
                continue
            self._progress(f"{name}: {options.fresh} fresh processes for {network.name}")
            needs_module = usable[network.name].source.module is not None
            task = FreshTask.model_validate(
                {
                    "runtime": name,
                    "options": self._building.runtime_options.get(name, {}),
                    "onnx_path": network.onnx_path,
                    "folder": network.folder if needs_module else None,
                    "model": self._building.model,
                    "device": self._building.device,
                    "input_shape": self._shape[1:],
                    "batches": sorted(self._inputs),
                    "threads": options.threads,
                    "precision": options.precision,
                    "seed": options.seed,
                }
            )
            try:
                yield network.name, self._fresh(task, options.fresh)
            except RuntimeUnavailableError as error:
                self._missing.append(NotMeasured(name, str(error), network.name, "cold start and host memory"))


def _filled(by_runtime: Mapping[str, Mapping[str, _Value]]) -> dict[str, Mapping[str, _Value]]:
    return {name: values for name, values in by_runtime.items() if values}
