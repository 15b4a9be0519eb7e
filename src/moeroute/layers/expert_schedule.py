"""How many experts a layer has, where that depends on its depth.

A schedule is one number for all layers, a tuple with one number a decoder layer, or four digits,
one for each quarter of the layers from the input up.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from moeroute.types import Site

QUARTERS = 4

Schedule = int | tuple[int, ...] | str


def check_schedule(schedule: Schedule, who: str) -> None:
    """Raise ValueError unless this is a schedule that gives every layer an expert.

    Args:
        schedule: To be checked.
        who: Named in errors.
    """
    if isinstance(schedule, str) and not (len(schedule) == QUARTERS and schedule.isdecimal()):
        raise ValueError(
            f"{who}: num_experts={schedule!r} is no schedule; give four digits, one for each "
            "quarter of the layers, or a tuple with one number a layer"
        )
    counts = (schedule,) if isinstance(schedule, int) else tuple(map(int, schedule))
    if min(counts, default=0) < 1:
        raise ValueError(
            f"{who}: num_experts={schedule!r} leaves a layer without experts; give each at least 1"
        )


def experts_at(schedule: Schedule, site: Site, who: str) -> int:
    """The number of experts of a site.

    Args:
        schedule: A checked one.
        site: Its layer_index and num_layers are read if the schedule speaks of layers.
        who: Named in errors.

    Raises:
        ValueError: The site lies in no decoder layer, or the schedule has another number of layers
            than the host.
    """
    if isinstance(schedule, int):
        return schedule
    if not 0 <= site.layer_index < site.num_layers:
        raise ValueError(
            f"{who}: num_experts={schedule!r} speaks of layers, but {site.name} lies in none that "
            f"is known (layer {site.layer_index} of {site.num_layers}); give one number, or target "
            "linears of the decoder layers alone"
        )
    if isinstance(schedule, str):
        return int(schedule[QUARTERS * site.layer_index // site.num_layers])
    if len(schedule) != site.num_layers:
        raise ValueError(
            f"{who}: num_experts has {len(schedule)} numbers for a host of {site.num_layers} "
            "layers; give one a layer"
        )
    return schedule[site.layer_index]
