"""Translation between this package and its hosts, NNI and torch-pruning: no algorithm lives here.

The only files that import ``nni`` or ``torch_pruning``. Users import the faces above them: ``nni_prune_ext.pruning``,
``.speedup``, ``.utils``, ``.torch_pruning`` and ``.experiments``.
"""
