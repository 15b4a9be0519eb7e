"""How deep a model is: fix it, search it, and what the search is made of.

`moeroute.methods.DrLLM` learns what `search_labels` finds; `search_routes` says how well a
`moeroute.methods.DuoLLM` could choose.
"""

from moeroute.integration.depth.answers import Question as Question
from moeroute.integration.depth.answers import exact_match as exact_match
from moeroute.integration.depth.answers import log_likelihood as log_likelihood
from moeroute.integration.depth.answers import multiple_choice as multiple_choice
from moeroute.integration.depth.curve import DepthPoint as DepthPoint
from moeroute.integration.depth.curve import depth_curve as depth_curve
from moeroute.integration.depth.distil import distillation_loss as distillation_loss
from moeroute.integration.depth.first_guess import first_guess as first_guess
from moeroute.integration.depth.flops import FlopsSaved as FlopsSaved
from moeroute.integration.depth.flops import executed_flops as executed_flops
from moeroute.integration.depth.flops import flops_saved as flops_saved
from moeroute.integration.depth.force import force_depth as force_depth
from moeroute.integration.depth.force_widths import force_widths as force_widths
from moeroute.integration.depth.influence import block_influence as block_influence
from moeroute.integration.depth.search_labels import DepthLabels as DepthLabels
from moeroute.integration.depth.search_labels import search_labels as search_labels
from moeroute.integration.depth.search_routes import OracleRoutes as OracleRoutes
from moeroute.integration.depth.search_routes import search_routes as search_routes
from moeroute.integration.depth.search_sparsity import SparsitySearch as SparsitySearch
from moeroute.integration.depth.search_sparsity import search_sparsity as search_sparsity
from moeroute.integration.depth.speculate import Speculation as Speculation
from moeroute.integration.depth.speculate import speculate as speculate
from moeroute.integration.depth.stages import train_only as train_only
from moeroute.layers.early_exit import exit_at as exit_at
from moeroute.ops.layer_paths import count_actions as count_actions
from moeroute.ops.widths import Width as Width
from moeroute.search import SearchSettings as SearchSettings
from moeroute.search import search_path as search_path
from moeroute.search.schedule import GeneticSettings as GeneticSettings

__all__ = [
    "DepthLabels",
    "DepthPoint",
    "FlopsSaved",
    "GeneticSettings",
    "OracleRoutes",
    "Question",
    "SearchSettings",
    "SparsitySearch",
    "Speculation",
    "Width",
    "block_influence",
    "count_actions",
    "depth_curve",
    "distillation_loss",
    "exact_match",
    "executed_flops",
    "exit_at",
    "first_guess",
    "flops_saved",
    "force_depth",
    "force_widths",
    "log_likelihood",
    "multiple_choice",
    "search_labels",
    "search_path",
    "search_routes",
    "search_sparsity",
    "speculate",
    "train_only",
]
