"""Muon for the matrices inside the layers, AdamW for the embedding, the norms and a reward model's head.

Muon (Jordan et al., 2024) replaces the momentum of a matrix by its nearest semi-orthogonal matrix, found with five
Newton-Schulz steps.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)


def orthogonalise(matrix: Tensor, steps: int = 5) -> Tensor:
    """The semi-orthogonal matrix near `matrix` [rows, columns], approximately (singular values within 0.7..1.2)."""
    a, b, c = NEWTON_SCHULZ
    x: Tensor = matrix / (matrix.norm() + 1e-7)
    tall = x.shape[0] > x.shape[1]
    x = x.T if tall else x
    for _ in range(steps):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if tall else x


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised; the step is scaled so that its RMS does not depend on the matrix's shape."""

    def __init__(self, params: Iterable[Tensor], lr: float, momentum: float = 0.95, weight_decay: float = 0.05) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update."""
        for group in self.param_groups:
            for weight in group["params"]:
                state = self.state[weight]
                moving = state.setdefault("momentum", torch.zeros_like(weight))
                moving.mul_(group["momentum"]).add_(weight.grad)
                update = orthogonalise(weight.grad.add(moving, alpha=group["momentum"]))
                scale = 0.2 * max(weight.shape) ** 0.5
                weight.mul_(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=-group["lr"] * scale)


def optimizers(model: nn.Module, lr: float) -> list[torch.optim.Optimizer]:
    """Both optimizers, sharing one learning rate scale."""
    learned = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    matrices = [p for n, p in learned if p.dim() == 2 and "layers" in n]
    rest = [p for n, p in learned if p.dim() != 2 or "layers" not in n]
    adam = torch.optim.AdamW(rest, lr=lr, betas=(0.9, 0.95), weight_decay=0.0)
    return [Muon(matrices, lr=lr), adam]
