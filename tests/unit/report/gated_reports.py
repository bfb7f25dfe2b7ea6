"""Reports about gated networks with plausible numbers, as the dictionaries that ``report.json`` holds."""

from __future__ import annotations

from collections.abc import Sequence

from sample_reports import DENSE, PRUNED, sample

GATED = {**DENSE, "kind": "gated", "macs": 70_000_000, "certificate": 1e-16}
REASON = "The ONNX file does not compute what the gated network computes: 0.91 of the mask bits agree."


def gating(*, layers: int = 6, gathered: Sequence[int] = (1, 3), network: str = "ftwt") -> dict[str, object]:
    """Returns the entry of one gated network, both of whose files were written."""
    names = [f"features.stage{number // 4}.block{number % 4}.conv1" for number in range(layers)]
    masked = {
        name: f"it fires at {_rate(number):.2f}, and gains below 0.65 only"
        for number, name in enumerate(names)
        if number not in gathered
    }
    return {
        "network": network,
        "data": "test images",
        "images": 9_973,
        "layers": [_layer(name, number) for number, name in enumerate(names)],
        "macs": {
            "dense": 125_485_696.0,
            "mean": 71_123_456.0,
            "spread": 4_567_890.0,
            "smallest": 51_234_567.0,
            "largest": 98_765_432.0,
            "heads": 1_254_857.0,
            "official": 60_606_060.0,
        },
        "files": [
            {
                "name": f"{network}-mask",
                "flavour": "mask",
                "masked": dict.fromkeys(names, "the flavour is mask"),
                "limits": "no faster than the network without gates",
                "agreement": _agreement(1.0, 64),
            },
            {
                "name": f"{network}-compact",
                "flavour": "compact",
                "gathered": [name for number, name in enumerate(names) if number in gathered],
                "masked": masked,
                "limits": "one image at a time",
                "agreement": _agreement(0.99975, 61),
            },
        ],
        "failed": {},
    }


def without_compact(own: dict[str, object]) -> dict[str, object]:
    """Returns the entry of a network whose compact file could not be written."""
    files = [file for file in _files(own) if file["flavour"] == "mask"]
    return {**own, "files": files, "failed": {f"{own['network']}-compact": REASON}}


def gated_sample(*entries: dict[str, object], times: Sequence[float] = (1.0, 1.1, 0.7, 0.8)) -> dict[str, object]:
    """Returns the report of a run with gated networks.

    Args:
        times: milliseconds of the dense network, the two gated files, and the network without gates.
    """
    names = ("dense", "ftwt-mask", "ftwt-compact", "ftwt")
    content = sample(method="ftwt")
    rows = [
        {**row, "name": name, "latency_ms": time, "latency_ratio": time / times[0]}
        for row, name, time in zip((DENSE, GATED, GATED, PRUNED), names, times)
    ]
    latency = [{"name": name, "p50_ms": time, "ratio": time / times[0]} for name, time in zip(names, times)]
    return {
        **content,
        "rows": rows,
        "latency": {"rows": latency, "error_bar": 0.01, "aa_ratio": 0.99},
        "gating": list(entries),
    }


def _files(own: dict[str, object]) -> list[dict[str, object]]:
    files = own["files"]
    assert isinstance(files, list)
    return files


def _rate(number: int) -> float:
    return 0.3 if number % 2 else 0.875


def _layer(name: str, number: int) -> dict[str, object]:
    filters = 64 << min(number // 4, 3)
    return {
        "layer": name,
        "filters": filters,
        "units": filters // 16,
        "never": number,
        "always": 16,
        "varying": filters - 16 - number,
        "rate": _rate(number),
        "entropy_bits": 0.4321,
        "break_even": None if number == 2 else 0.75,
    }


def _agreement(share: float, compared: int) -> dict[str, object]:
    return {
        "images": 64,
        "bits": 40_000,
        "agreement": share,
        "compared": compared,
        "max_rel": 3.4e-7,
        "fail": 1e-4,
    }
