"""``python -m nni_prune_ext``: the command line, also under ``torchrun -m nni_prune_ext``."""

from __future__ import annotations

from nni_prune_ext.cli import main

if __name__ == "__main__":
    main()
