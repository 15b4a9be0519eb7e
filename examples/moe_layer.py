"""Import a mixture-of-experts layer into a model of your own, and train it with a plain loop.

The task needs different maps in different places: tokens come from four clusters, and each cluster
has a linear map of its own that the layer has to learn.
"""

import torch
from torch import nn

import moeroute
from moeroute.losses import BalanceLoss, ZLoss


class Block(nn.Module):
    """A residual block around a routed feed-forward layer."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(hidden_size)
        self.moe = moeroute.MoELayer.build(
            hidden_size=hidden_size,
            intermediate_size=2 * hidden_size,
            num_experts=8,
            top_k=2,
            losses=(BalanceLoss(weight=0.01), ZLoss(weight=1e-3)),
        )

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:  # (B, S, H)
        return hidden_states + self.moe(self.norm(hidden_states))


def main(steps: int = 300, hidden_size: int = 32) -> float:
    """Train and return the share of variance that is left unexplained."""
    torch.manual_seed(0)
    centres = torch.randn(4, hidden_size) * 2
    maps = torch.randn(4, hidden_size, hidden_size) / hidden_size**0.5
    model = Block(hidden_size)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(steps):
        cluster = torch.randint(4, (8, 32))
        inputs = centres[cluster] + torch.randn(8, 32, hidden_size)
        wanted = torch.einsum("bsh,bsho->bso", inputs, maps[cluster])
        error = (model(inputs) - wanted).square().mean()
        balance = moeroute.aux_losses(model)
        (error + balance.total).backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 50 == 0 or step == steps - 1:
            parts = {name: round(part.item(), 3) for name, part in balance.parts.items()}
            print(f"step {step:3d}  error / variance {error / wanted.var():.3f}  {parts}")
    return (error / wanted.var()).item()


if __name__ == "__main__":
    main()
