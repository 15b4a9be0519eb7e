"""Search for how deep a model must be for one question: no model is known here, only rewards."""

from moeroute.search.layer_tree import PathSearch as PathSearch
from moeroute.search.layer_tree import SearchSettings as SearchSettings
from moeroute.search.layer_tree import search_path as search_path
from moeroute.search.schedule import GeneticSettings as GeneticSettings
from moeroute.search.schedule import ScheduleSearch as ScheduleSearch
from moeroute.search.schedule import search_schedule as search_schedule

__all__ = [
    "GeneticSettings",
    "PathSearch",
    "ScheduleSearch",
    "SearchSettings",
    "search_path",
    "search_schedule",
]
