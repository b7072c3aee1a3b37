"""Muon for the matrices, Adam for the rest; processes share the gradients and the work."""

import torch
import torch.distributed as dist
from torch import Tensor, nn

ADAM_ONLY = ("embed", "conv1d", "in_proj_a", "in_proj_b")


def orthogonal(x: Tensor) -> Tensor:
    """Newton-Schulz towards the nearest orthogonal matrix (Muon's five steps)."""
    a, b, c = 3.4445, -4.7750, 2.0315
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    x = x / (x.norm() + 1e-7)
    for _ in range(5):
        y = x @ x.mT
        x = a * x + (b * y + c * y @ y) @ x
    return x.mT if tall else x


def is_matrix(name: str, p: Tensor) -> bool:
    return p.ndim > 1 and not any(part in name for part in ADAM_ONLY)


class Optimizer:
    """`step` takes gradients of the *sum* of losses and the number of tokens they come from."""

    def __init__(self, model: nn.Module, workers: int, rank: int) -> None:
        self.named = list(model.named_parameters())
        self.workers, self.rank, self.count = workers, rank, 0
        self.first = {n: torch.zeros_like(p) for n, p in self.named}
        self.second = {n: torch.zeros_like(p) for n, p in self.named if not is_matrix(n, p)}

    def state(self) -> dict:
        return {"first": self.first, "second": self.second, "count": self.count}

    def load(self, state: dict) -> None:
        self.first, self.second = state["first"], state["second"]
        self.count = state["count"]

    def share(self, tensors: list[Tensor]) -> list[Tensor]:
        """Sum over the processes."""
        if self.workers == 1:
            return tensors
        flat = torch.cat([t.flatten() for t in tensors])
        dist.all_reduce(flat)
        parts = flat.split([t.numel() for t in tensors])
        return [p.view(t.shape) for p, t in zip(parts, tensors, strict=True)]

    @torch.no_grad()
    def step(self, muon_lr: float, adam_lr: float, tokens: int) -> None:
        live = [(n, p) for n, p in self.named if p.grad is not None]
        grads = self.share([p.grad for _, p in live] + [torch.tensor([float(tokens)])])
        total = grads.pop()
        self.count += 1
        updates, turn = [], 0
        for (name, p), grad in zip(live, grads, strict=True):
            p.grad = None
            grad = grad / total
            if is_matrix(name, p):
                turn += 1
                mine = turn % self.workers == self.rank
                updates.append(self.muon(name, grad, muon_lr, mine))
            else:
                p.add_(self.adam(name, grad), alpha=-adam_lr)
        matrices = [(n, p) for n, p in live if is_matrix(n, p)]
        for (_, p), update in zip(matrices, self.share(updates), strict=True):
            p.mul_(1 - 0.02 * muon_lr).sub_(update)

    def muon(self, name: str, grad: Tensor, lr: float, mine: bool) -> Tensor:
        """The update of one matrix, or zeros where another process makes it."""
        momentum = self.first[name].lerp_(grad, 0.05)
        if not mine:
            return torch.zeros_like(grad)
        x = grad.lerp(momentum, 0.95).flatten(1)
        scale = max(1.0, x.shape[0] / x.shape[1]) ** 0.5
        return (orthogonal(x) * (lr * scale)).view_as(grad)

    def adam(self, name: str, grad: Tensor) -> Tensor:
        first = self.first[name].lerp_(grad, 0.1)
        second = self.second[name].lerp_(grad.square(), 0.05)
        first = first / (1 - 0.9**self.count)
        return first / ((second / (1 - 0.95**self.count)).sqrt() + 1e-8)
