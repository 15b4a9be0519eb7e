"""What losses over samples ask of a record."""

from __future__ import annotations

from moeroute.types import AuxLoss, RoutingRecord


def sample_shape(record: RoutingRecord, loss: AuxLoss) -> tuple[int, int]:
    """(B, S) of a record's tokens.

    Raises:
        ValueError: The layer was not told.
    """
    if record.sequence_shape is None:
        raise ValueError(
            f"{record.site}: {type(loss).__name__} needs to know which tokens are of one sample, "
            "but the layer saw tokens alone. Call it with (B, S, H) hidden states, inside a "
            "wrapped model or one of your own after moeroute.connect_layers(model)"
        )
    return record.sequence_shape
