"""Tells the routers of a model what each expert is for."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from moeroute.routers.instructions import InstructionScore


def set_instruction_embeddings(model: nn.Module, embeddings: Mapping[str, Tensor]) -> None:
    """Give the experts of a mixture the embeddings of their instructions; they are saved with it.

    Args:
        model: A model that holds a mixture which routes by instruction, such as
            `mix_adapters(model, paths, router=GLIDER(...))`.
        embeddings: Expert's name -> (D,), one for each expert of the mixture; of any length.

    Raises:
        ValueError: No mixture has just these experts, or a tensor has another width. Nothing is
            changed then.
    """
    scores = [part for part in model.modules() if isinstance(part, InstructionScore)]
    meant = [score for score in scores if set(score.names) == set(embeddings)]
    if not meant:
        known = sorted({score.names for score in scores})
        raise ValueError(
            f"embeddings for {sorted(embeddings)}, but the mixtures by instruction in this "
            f"{type(model).__name__} have the experts {known}; give one embedding an expert"
        )
    width = meant[0].expert_embeddings.shape[1]
    for name, embedding in embeddings.items():
        if embedding.shape != (width,):
            raise ValueError(
                f"the embedding of {name!r} is {tuple(embedding.shape)}; this mixture was made for "
                f"({width},). Set GLIDER.instruction_dim to what the embedder gives"
            )
    for score in meant:
        score.set_embeddings(embeddings)
