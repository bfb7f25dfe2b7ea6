"""Five toy methods, one per species: they show that the method contract fits each without a test on names."""

from nni_prune_ext.testing.toy_controller import CONTROLLER
from species.data_free import DATA_FREE
from species.gated import GATED
from species.mask_search import MASK_SEARCH
from species.reconstruction import RECONSTRUCTION

SPECIES = {spec.name: spec for spec in (DATA_FREE, RECONSTRUCTION, CONTROLLER, MASK_SEARCH, GATED)}
