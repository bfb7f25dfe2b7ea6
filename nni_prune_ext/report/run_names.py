"""How a page and the terminal call each of several runs: by title and folder."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from nni_prune_ext.report.facts import MANIFEST, RunReport


def run_names(reports: Sequence[RunReport]) -> list[str]:
    """Returns title and folder of every run; only the title where the folder is not known or says the same."""
    return [
        f"{report.heading} · {folder}" if folder and folder != report.heading else report.heading
        for report, folder in zip(reports, folder_names(reports))
    ]


def folder_names(reports: Sequence[RunReport]) -> list[str]:
    """Returns the end of every run's path, as long as it takes to tell the runs apart; empty where not known."""
    parts = [report.folder.parts[1:] if report.folder else () for report in reports]
    depths = [2 if report.folder and (report.folder / MANIFEST).is_file() else 1 for report in reports]
    for _ in range(max(map(len, parts), default=0)):
        names = ["/".join(path[-depth:]) for path, depth in zip(parts, depths)]
        places = Counter(name for name, _ in set(zip(names, parts)))
        shared = {name for name, count in places.items() if count > 1}
        depths = [depth + (name in shared) for name, depth in zip(names, depths)]
    return ["/".join(path[-depth:]) for path, depth in zip(parts, depths)]
