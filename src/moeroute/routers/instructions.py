"""A score that also asks which expert's description is nearest to what the sample is about.

Axes: B samples, T tokens, H hidden, E experts, D width of an embedding.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from moeroute.routers.samples import to_tokens
from moeroute.routers.scores import Score, linear_logits
from moeroute.types import RouterInput

HOW = (
    "call model(..., sample_embeddings=rows) with one row a sample, or open `with "
    "moeroute.routing_inputs(model, sample_embeddings=rows):`"
)


@dataclass(frozen=True, kw_only=True, slots=True)
class StepWeight:
    """How much similarity counts: more where some expert is near.

        c = gamma + beta * 1[max_e cos_e >= threshold]

    Attributes:
        gamma: What it counts always.
        beta: What is added for a sample that is near; 0 makes c constant.
        threshold: Cosine from which on a sample is near.
    """

    gamma: float
    beta: float
    threshold: float

    @property
    def is_zero(self) -> bool:
        """Whether similarity never counts."""
        return self.gamma == 0 and self.beta == 0

    def __call__(self, cosines: Tensor) -> Tensor:
        """(B, E) cosines to (B, 1) weights."""
        near = cosines.amax(dim=1, keepdim=True) >= self.threshold
        return self.gamma + self.beta * near.to(cosines.dtype)


class InstructionScore(nn.Module):
    """Another score plus, in eval, the similarity of sample and expert.

        logits_e = score_e(x) + c * cos(expert_embedding_e, sample_embedding)

    In training it is the other score alone, which is what there is to train.

    Source: GLIDER: Global and Local Instruction-Driven Expert Router, Li et al., 2024, arXiv
    2410.07172; the official code.

    Args:
        score: Over all experts.
        embedding_dim: D.
        names: What each expert is called.
        weight: c, from the cosines of a sample.

    Shapes:
        expert_embeddings: (E, D), zero until `set_embeddings`; of any length, they are normalised.
        router_logits: (T, E) float32, or float64.

    Raises:
        ValueError: In an eval forward with c above 0, no sample_embeddings, some of another width,
            or experts without an embedding (on a GPU: a device assertion).
    """

    score: Score
    expert_embeddings: Tensor

    def __init__(
        self, score: Score, embedding_dim: int, names: Sequence[str], weight: StepWeight
    ) -> None:
        super().__init__()
        self.score = score
        self.num_experts = score.num_experts
        self.names = tuple(names)
        self.weight = weight
        self.register_buffer("expert_embeddings", torch.zeros(self.num_experts, embedding_dim))

    @torch.no_grad()
    def set_embeddings(self, embeddings: Mapping[str, Tensor]) -> None:
        """Take each expert's (D,) embedding by its name."""
        for row, name in zip(self.expert_embeddings, self.names, strict=True):
            row.copy_(embeddings[name])

    def forward(self, router_input: RouterInput) -> Tensor:
        """Answer (T, E) logits."""
        logits = self.score(router_input)
        if self.training or self.weight.is_zero:
            return logits
        cosines = self._cosines(router_input)
        bias = self.weight(cosines) * cosines  # (B, E)
        return logits + to_tokens(bias, router_input.sequence_shape)

    def _cosines(self, router_input: RouterInput) -> Tensor:
        samples, experts = router_input.sample_embeddings, self.expert_embeddings
        if samples is None:
            raise ValueError(f"routing by instruction got no sample_embeddings; {HOW}")
        if samples.ndim != 2 or samples.shape[1] != experts.shape[1]:
            raise ValueError(
                f"sample_embeddings is {tuple(samples.shape)} but the experts' embeddings are "
                f"{experts.shape[1]} wide; embed both with the same embedder"
            )
        self._check_experts()
        return linear_logits(_unit(samples.to(experts.device)), _unit(experts), None, None)

    def _check_experts(self) -> None:
        known = (self.expert_embeddings != 0).any(dim=1).all()
        if torch.compiler.is_compiling() or known.device.type != "cpu":
            message = "an expert has no instruction embedding"
            torch._assert_async(known, message)  # pyright: ignore[reportPrivateImportUsage]
        elif not known:
            missing = (self.expert_embeddings == 0).all(dim=1).tolist()
            names = [name for name, gone in zip(self.names, missing, strict=True) if gone]
            raise ValueError(
                f"experts {names} have no instruction embedding; call "
                "moeroute.layers.set_instruction_embeddings(model, {name: embedding})"
            )

    def extra_repr(self) -> str:
        """Sizes, for `print(model)`."""
        return f"names={self.names}, embedding_dim={self.expert_embeddings.shape[1]}"


def _unit(rows: Tensor) -> Tensor:
    """Rows of length 1, in float32 or wider."""
    wide = rows.to(torch.promote_types(rows.dtype, torch.float32))
    return functional.normalize(wide, dim=-1)
