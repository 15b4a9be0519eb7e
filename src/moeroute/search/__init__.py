"""Search for how deep a model must be for one question: no model is known here, only rewards."""

from moeroute.search.layer_tree import PathSearch as PathSearch
from moeroute.search.layer_tree import SearchSettings as SearchSettings
from moeroute.search.layer_tree import search_path as search_path

__all__ = ["PathSearch", "SearchSettings", "search_path"]
