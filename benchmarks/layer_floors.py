"""What the library promises about layers: mixtures of LoRA, LoRA on experts, routers."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.floors import Row, Verdict, all_above, all_within, noise
from benchmarks.shapes import EXPERT_LORA_DECODE_SHAPE, EXPERT_LORA_FLOOR_CASES

__all__ = ["judge_layers"]

MIXTURE_OF_LORA = 1.3
MIXTURE_OF_LOOP = 0.5
REBUILT_SPEEDUP = 2.0
ROUTER_OF_THEIRS = 1.3
HALF_OF_BASE = 0.60
ALL_RUN_OF_BASE = 1.03
DECODE_SPEEDUP = 8.0


def judge_layers(rows: Sequence[Row]) -> list[Verdict]:
    """Judge the promises about layers.

    Args:
        rows: Of one run.
    """
    return [
        *_mixture(rows),
        *_expert_lora(rows, "grouped_lora", "rebuilt", "the rebuilt stack"),
        *_expert_lora(rows, "expert_lora", "peft", "PEFT's target_parameters"),
        _router(rows),
        *_depth(rows),
    ]


def _router(rows: Sequence[Row]) -> Verdict:
    """Routers of our parts against those of transformers that they equal."""
    ratios = {
        row.label: ratio
        for row in rows
        if row.key[0] == "router" and (ratio := row.over("transformers")) is not None
    }
    words = f"router <= {ROUTER_OF_THEIRS:.2f} of transformers'"
    return all_within(words, ratios, ROUTER_OF_THEIRS, noise(rows))


def _depth(rows: Sequence[Row]) -> list[Verdict]:
    """Decoders with half of their layers skipped, and with all of them run through our hosts."""
    own = [row for row in rows if row.key[0] == "depth"]
    promises = (("half", "half of the layers skipped", HALF_OF_BASE),)
    promises += (("all", "all layers run", ALL_RUN_OF_BASE),)
    return [
        all_within(
            f"depth, {words} <= {limit:.2f} of the base",
            {
                row.label: ratio
                for row in own
                if row.key[2].endswith(ending) and (ratio := row.over("base")) is not None
            },
            limit,
            noise(rows),
        )
        for ending, words, limit in promises
    ]


def _mixture(rows: Sequence[Row]) -> list[Verdict]:
    """A whole mixture over one linear against plain LoRA of its rank, and a loop over experts."""
    own = [row for row in rows if row.key[:2] == ("lora_mixture", "fwd_bwd")]
    limits = {"peft_lora": MIXTURE_OF_LORA, "masked_loop": MIXTURE_OF_LOOP}
    return [
        all_within(
            f"lora_mixture, fwd_bwd <= {limit:.2f} of {peer}",
            {row.label: ratio for row in own if (ratio := row.over(peer)) is not None},
            limit,
            noise(rows),
        )
        for peer, limit in limits.items()
    ]


def _expert_lora(rows: Sequence[Row], op: str, peer: str, words: str) -> list[Verdict]:
    """LoRA on experts against stacks that are rebuilt with every delta."""
    trained = {
        row.label: 1 / ratio
        for row in rows
        if row.key[:2] == (op, "fwd_bwd")
        and row.key[2:4] in EXPERT_LORA_FLOOR_CASES
        and (ratio := row.over(peer))
    }
    decoded = {
        row.label: 1 / ratio
        for row in rows
        if row.key[:4] == (op, "fwd", EXPERT_LORA_DECODE_SHAPE, 1) and (ratio := row.over(peer))
    }
    few = max(tokens for _, tokens in EXPERT_LORA_FLOOR_CASES)
    return [
        all_above(
            f"{op}, fwd_bwd at T <= {few}: >= {REBUILT_SPEEDUP:.0f}x {words}",
            trained,
            REBUILT_SPEEDUP,
        ),
        all_above(
            f"{op}, fwd of one token at {EXPERT_LORA_DECODE_SHAPE}: >= {DECODE_SPEEDUP:.0f}x "
            f"{words}",
            decoded,
            DECODE_SPEEDUP,
        ),
    ]
