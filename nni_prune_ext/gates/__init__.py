"""Gates that switch channels per input: heads that predict masks, their targets, and what they save."""

from nni_prune_ext.gates.estimates import GatingEstimate as GatingEstimate
from nni_prune_ext.gates.estimates import MeasuredGating as MeasuredGating
from nni_prune_ext.gates.estimates import estimate_gating as estimate_gating
from nni_prune_ext.gates.estimates import measure_gating as measure_gating
from nni_prune_ext.gates.estimates import solve_mass as solve_mass
from nni_prune_ext.gates.expected_macs import ExpectedMacs as ExpectedMacs
from nni_prune_ext.gates.expected_macs import expected_macs as expected_macs
from nni_prune_ext.gates.gated_network import GatedNetwork as GatedNetwork
from nni_prune_ext.gates.signature import firing_signature as firing_signature
