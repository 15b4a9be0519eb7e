"""A feed-forward block with a small twin: each token takes either of them, or neither.

Axes: B batch, S sequence, T tokens = B * S, H hidden, X widths.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from moeroute.layers.post_step import in_backward, stateful_parts
from moeroute.ops.gates import expert_table
from moeroute.ops.widths import Width
from moeroute.outputs import DistilOutput
from moeroute.routers.learns import learns
from moeroute.routing_pass import RoutingPass
from moeroute.types import RouterInput, RouterOutput, RoutingRecord

if TYPE_CHECKING:
    from moeroute.routers.composed import ComposedRouter
    from moeroute.types import AuxLoss


class WidthFeedForward(nn.Module):
    """Small, big or no feed-forward block for each token; the big one is the checkpoint's.

        evaluation                          y = FFN_x(u), x the router's choice; no other is run
        training, the router learns         y = sum_x P_x FFN_x(u), FFN_bypass = 0
        training, the small one learns alone    y = big(u), or small(u) where it is drawn so

    While the small one learns it is also taught what the big one answers, on inputs that carry no
    gradient. What learns is what has `requires_grad`. Evaluation reads how many tokens take which
    block, which waits for the device.

    Args:
        router: Over X widths, 2 or 3, with `moeroute.routers.width_choice.WidthChoice`.
        small: (..., H) to (..., H).
        random_share: Share of tokens that take the small one while it learns alone.
        small_losses: Charged in training while the small one learns; `DistilLoss` can be.
        routing_losses: Charged in training while the router learns.
        site: Full module name of the block.
        layer_index: Its position in depth, -1 if it has none.

    Shapes:
        hidden_states: (..., H), any floating dtype; the output has its shape.
        forced: None, or int64 widths: () for all tokens, (B,) a sequence, (B, S) a token. They are
            taken in the place of the router's, in training too, and no loss is charged.

    Raises:
        ValueError: In forward, `forced` speaks of other sequences or tokens; the small block learns
            alone, but by no loss and on no token.
    """

    def __init__(
        self,
        *,
        router: ComposedRouter,
        small: nn.Module,
        random_share: float = 0.0,
        small_losses: tuple[AuxLoss, ...] = (),
        routing_losses: tuple[AuxLoss, ...] = (),
        site: str = "",
        layer_index: int = -1,
    ) -> None:
        super().__init__()
        self.router = router
        self.small = small
        self.random_share = random_share
        self.small_losses = small_losses
        self.routing_losses = routing_losses
        self.site = site
        self.layer_index = layer_index
        self.routing_pass = RoutingPass()
        self.forced: Tensor | None = None

    @property
    def stages(self) -> Mapping[str, tuple[nn.Module, ...]]:
        """What learns by itself: see `moeroute.depth.train_only`."""
        return {"small": (self.small,), "routers": (self.router,)}

    @property
    def losses(self) -> tuple[AuxLoss, ...]:
        """What this layer asks to be charged now."""
        if not self.training or self.forced is not None:
            return ()
        small = self.small_losses if learns(self.small) else ()
        return (*small, *(self.routing_losses if learns(self.router) else ()))

    def forward(self, hidden_states: Tensor, base: nn.Module) -> Tensor:
        """Answer in place of `base(hidden_states)`."""
        given = self.routing_pass.router_input(hidden_states, self.site)
        if self.forced is not None:
            routing = self._forced(given, self.forced)
        elif self.training:
            return self._trained(hidden_states, base, given)
        else:
            routing = self.router(given)
        self._keep(given, routing)
        return self._gathered(hidden_states, base, routing.selected_experts[:, 0])

    def _trained(self, hidden_states: Tensor, base: nn.Module, given: RouterInput) -> Tensor:
        alone = learns(self.small) and not learns(self.router)
        if alone and not (self.small_losses or self.random_share):
            raise ValueError(
                f"{self.site}: nothing teaches the small block, which alone learns: give it a loss "
                "(DuoLLM(distil_loss_coef=1.0)), or tokens (random_share=0.5)"
            )
        routing = self._drawn(given) if alone else self.router(given)
        big = base(hidden_states)
        taught = self._taught(given, routing, big) if self._teaches else routing
        self._keep(given, taught, moves=not alone)
        if alone and not self.random_share:
            return big
        small = self._small(hidden_states)
        table = expert_table(routing.selected_experts, routing.routing_weights, routing.num_experts)
        weights = table.reshape(*hidden_states.shape[:-1], routing.num_experts, 1)  # (..., X, 1)
        mixed = weights[..., Width.BIG, :] * big + weights[..., Width.SMALL, :] * small
        return mixed.to(big.dtype)

    @property
    def _teaches(self) -> bool:
        return bool(self.small_losses) and learns(self.small)

    def _taught(self, given: RouterInput, routing: RouterOutput, big: Tensor) -> DistilOutput:
        return DistilOutput(
            router_logits=routing.router_logits,
            routing_weights=routing.routing_weights,
            selected_experts=routing.selected_experts,
            taught=self._small(given.hidden_states.detach()),
            target=big.detach().reshape(given.hidden_states.shape),
        )

    def _small(self, tokens: Tensor) -> Tensor:
        """The small block on (..., H), in the dtype of its own weights and then of the tokens."""
        dtype = next(self.small.parameters()).dtype
        return self.small(tokens.to(dtype)).to(tokens.dtype)

    def _gathered(self, hidden_states: Tensor, base: nn.Module, widths: Tensor) -> Tensor:
        """Each block on the tokens of the (T,) widths that are its own; 0 for the others."""
        of_big = (widths == Width.BIG).nonzero()[:, 0]
        if len(of_big) == len(widths):
            return base(hidden_states)
        of_small = (widths == Width.SMALL).nonzero()[:, 0]
        tokens = hidden_states.reshape(-1, hidden_states.shape[-1])  # (T, H)
        out = torch.zeros_like(tokens)
        if len(of_big):
            out = out.index_copy(0, of_big, base(tokens[of_big][None])[0].to(out.dtype))
        if len(of_small):
            out = out.index_copy(0, of_small, self._small(tokens[of_small]))
        return out.reshape(hidden_states.shape)

    def _drawn(self, given: RouterInput) -> RouterOutput:
        """Small for a random share of the tokens, big for the others."""
        tokens = given.hidden_states
        small = torch.rand(len(tokens), device=tokens.device) < self.random_share
        return certain(
            torch.where(small, int(Width.SMALL), int(Width.BIG)), self.router.num_experts
        )

    def _forced(self, given: RouterInput, widths: Tensor) -> RouterOutput:
        batch, length = given.sequence_shape
        widths = widths.to(given.hidden_states.device)
        if widths.ndim and widths.shape[0] and batch % widths.shape[0] == 0:  # beams
            widths = widths.repeat_interleave(batch // widths.shape[0], dim=0)
        grid = widths.reshape(*widths.shape, *(1,) * (2 - widths.ndim))
        if grid.shape[0] not in (1, batch) or grid.shape[1] not in (1, length):
            raise ValueError(
                f"{self.site}: widths of shape {tuple(widths.shape)} are forced on {batch} "
                f"sequences of {length} tokens; force one for all, (B,) or (B, S)"
            )
        return certain(grid.expand(batch, length).reshape(-1), self.router.num_experts)

    def _keep(self, given: RouterInput, routing: RouterOutput, *, moves: bool = False) -> None:
        """Keep a record of this call, and show it to what moves with the optimizer's steps."""
        losses, routing_pass = self.losses, self.routing_pass
        shown = moves and routing_pass.is_open and not in_backward()
        watching = stateful_parts(self.router) if shown else []
        wanted = routing_pass.wants(charged=bool(losses))
        if not (watching or wanted):
            return
        record = RoutingRecord(
            site=self.site,
            layer_index=self.layer_index,
            routing=routing,
            token_mask=given.token_mask,
            sequence_shape=given.sequence_shape,
            router=self.router,
            losses=losses,
            expert_names=self._names,
        )
        for part in watching:
            part.observe(record)
        if wanted:
            routing_pass.keep(record, charged=bool(losses))

    @property
    def _names(self) -> tuple[str, ...]:
        return tuple(width.name.lower() for width in list(Width)[: self.router.num_experts])

    def extra_repr(self) -> str:
        """Settings, for `print(model)`."""
        return f"random_share={self.random_share:g}"


def certain(widths: Tensor, num_widths: int) -> RouterOutput:
    """The routing of (T,) int64 widths that no router chose: logits 0 there and -inf elsewhere."""
    chosen = widths[:, None].to(torch.int64)
    logits = torch.full((len(chosen), num_widths), -torch.inf, device=chosen.device)
    return RouterOutput(
        router_logits=logits.scatter(1, chosen, 0.0),
        routing_weights=torch.ones(chosen.shape, device=chosen.device),
        selected_experts=chosen,
    )
