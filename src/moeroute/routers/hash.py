"""A score that looks at the token's id alone.

Axes: T tokens, V rows of a table, E experts, K slots per token.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moeroute.routers.scores import Score
from moeroute.routers.select import check_top_k
from moeroute.types import RouterInput


class HashScore(nn.Module):
    """K fixed experts an id: their logits are 0, or another score's, all others minus infinity.

        logits_e = score_e(x), or 0, if e is in table[id mod V], else -inf

    With `TopKSoftmax(K)` the weights are 1 / K, or the other score's softmax over the K. The table
    is random, its first column with the same number of ids an expert, and is saved with the model.
    Ids beyond it share its rows, so that a larger vocabulary needs no new table.

    Source: Hash Layers For Large Sparse Models, Roller et al., 2021, arXiv 2106.04426, section 3;
    with a score as in transformers' DeepSeek-V4, whose first layers choose by id and weigh by a
    gate.

    Args:
        num_experts: E.
        top_k: K.
        table_size: V; at least the size of the vocabulary, or ids share their experts.
        seed: Of the table; give each layer its own, or all layers choose alike.
        score: Weighs the chosen experts; None weighs them all the same.

    Shapes:
        table: (V, K) int64, the experts of a row differ.
        router_logits: (T, E) float32, or float64.

    Raises:
        ValueError: K does not fit E, the table is empty, or the score is of another E; in forward,
            no token ids.
    """

    table: Tensor
    score: Score | None

    def __init__(
        self,
        num_experts: int,
        top_k: int = 1,
        *,
        table_size: int = 65536,
        seed: int = 0,
        score: nn.Module | None = None,
    ) -> None:
        super().__init__()
        check_top_k(top_k, num_experts)
        if table_size < 1:
            raise ValueError(f"table_size={table_size} is below 1; use the vocabulary's size")
        self.score = score  # pyright: ignore[reportAttributeAccessIssue]
        self.num_experts = num_experts
        if self.score is not None and self.score.num_experts != num_experts:
            raise ValueError(
                f"the score has num_experts={self.score.num_experts} but the table {num_experts}; "
                "give both the same"
            )
        self.register_buffer("table", random_table(table_size, num_experts, top_k, seed))

    def forward(self, router_input: RouterInput) -> Tensor:
        """Answer (T, E) logits.

        Raises:
            ValueError: The model was not called with input_ids.
        """
        ids, tokens = router_input.token_ids, router_input.hidden_states
        if ids is None:
            raise ValueError(
                "hash routing chooses by token ids but got none: call the model with input_ids, "
                "not inputs_embeds, wrapped by moeroute.wrap_model or after "
                "moeroute.connect_layers(model)"
            )
        chosen = self.table[ids % self.table.shape[0]]  # (T, K)
        if self.score is None:
            logits = tokens.new_zeros(
                tokens.shape[0],
                self.num_experts,
                dtype=torch.promote_types(tokens.dtype, torch.float32),
            )
        else:
            logits = self.score(router_input)
        shut = torch.ones_like(logits, dtype=torch.bool).scatter(1, chosen, value=False)
        return logits.masked_fill(shut, float("-inf"))

    def set_table(self, table: Tensor) -> None:
        """Take another (V, K) table, such as `balanced_table` makes.

        Raises:
            ValueError: The table has another K, or names experts that there are not.
        """
        wrong = table.ndim != 2 or table.shape[1] != self.table.shape[1] or not table.shape[0]
        if wrong or table.min() < 0 or table.max() >= self.num_experts:
            raise ValueError(
                f"a table of {tuple(table.shape)} does not fit; give (V, {self.table.shape[1]}) "
                f"experts in [0, {self.num_experts})"
            )
        self.table = table.to(self.table)

    def extra_repr(self) -> str:
        """Sizes, for `print(model)`."""
        rows, slots = self.table.shape
        return f"num_experts={self.num_experts}, top_k={slots}, table_size={rows}"


def random_table(rows: int, size: int, slots: int, seed: int) -> Tensor:
    """(rows, slots) int64 random experts in [0, size), each row's different.

    In the first column all experts have the same number of rows, but for one.
    """
    generator = torch.Generator().manual_seed(seed)
    first = torch.randperm(rows, generator=generator, device="cpu") % size
    draws = torch.rand(rows, size, generator=generator, device="cpu")
    return draws.scatter(1, first.unsqueeze(1), 2.0).topk(slots, dim=1).indices


def balanced_table(token_counts: Tensor, size: int, slots: int = 1) -> Tensor:
    """A table by frequency: the most frequent id first, each to the least loaded experts.

    Args:
        token_counts: (V,) how often each id occurs in the training text.
        size: E.
        slots: K.

    Returns:
        (V, K) int64.
    """
    table = torch.zeros(token_counts.shape[0], slots, dtype=torch.int64)
    load = torch.zeros(size, dtype=torch.float64)
    for row in torch.argsort(token_counts, descending=True, stable=True).tolist():
        chosen = torch.argsort(load, stable=True)[:slots]
        table[row] = chosen
        load[chosen] += token_counts[row].double()
    return table
