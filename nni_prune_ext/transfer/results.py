"""What came of a transfer: one row per network and seed, paired differences, and their file."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from pydantic import TypeAdapter

from nni_prune_ext.errors import OutputError
from nni_prune_ext.evaluation import environment
from nni_prune_ext.text_files import write_text

REPORT = "transfer.json"
FORMAT = 1


@dataclass(frozen=True)
class TransferRow:
    """One network, trained with one seed.

    Attributes:
        metrics: on the test split after the last epoch, 0–1; the first one is what is compared.
        parameters: that are not masked, in the convolutions of the network, in the network as far as it is used, and
            in all with the new head.
        losses: mean loss of every epoch.
    """

    network: str
    seed: int
    metrics: Mapping[str, float]
    parameters: Mapping[str, int]
    losses: tuple[float, ...]
    seconds: float


@dataclass(frozen=True)
class TransferReport:
    """All rows, and what they were trained on.

    Attributes:
        metric: name of what is compared.
        facts: data, head and training, for the reader.
        identity: hash of all that decides about the rows; empty outside a folder.
    """

    rows: tuple[TransferRow, ...]
    metric: str
    facts: Mapping[str, object]
    identity: str = ""

    def scores(self, network: str) -> dict[int, float]:
        """Returns seed → the metric of a network."""
        return {row.seed: row.metrics[self.metric] for row in self.rows if row.network == network}

    @property
    def networks(self) -> tuple[str, ...]:
        """Returns the names, in the order given; the first one is the reference."""
        return tuple(dict.fromkeys(row.network for row in self.rows))

    def differences(self, network: str, reference: str) -> tuple[float, float | None, int]:
        """Returns mean and standard deviation of the paired differences to a reference over common seeds, and how many.

        The deviation is that of the sample, ``None`` for a single pair.
        """
        own, other = self.scores(network), self.scores(reference)
        found = [own[seed] - other[seed] for seed in own if seed in other]
        if not found:
            return float("nan"), None, 0
        return statistics.fmean(found), statistics.stdev(found) if len(found) > 1 else None, len(found)

    def save(self, path: Path) -> None:
        """Writes it as JSON, atomically, with the versions and the machine that it was made on."""
        write_text(
            path,
            json.dumps(
                {"format": FORMAT, "identity": self.identity, **self.to_json(), "environment": environment()}, indent=1
            )
            + "\n",
        )

    def to_json(self) -> dict[str, object]:
        """Returns it as JSON-ready values."""
        return {"metric": self.metric, "facts": dict(self.facts), "rows": [asdict(row) for row in self.rows]}

    @classmethod
    def load(cls, path: Path) -> TransferReport:
        """Reads what ``save`` wrote.

        Raises:
            OutputError: it cannot be read.
        """
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            if content["format"] != FORMAT:
                raise ValueError(f"its format is {content['format']!r}, expected {FORMAT}")
            rows = TypeAdapter(tuple[TransferRow, ...]).validate_python(content["rows"])
            return cls(rows, str(content["metric"]), dict(content["facts"]), str(content["identity"]))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise OutputError(
                f"'{path}' cannot be read ({error}), expected what `transfer` wrote. Start anew with --overwrite."
            ) from error
