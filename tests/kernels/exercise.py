"""Runs every kernel once, at sizes that fit no tile: what a sanitizer looks at. ``python -m tests.kernels.exercise``."""

import torch

from fastadvisor_kernels import (
    Bernoulli,
    backend,
    mes_cross_entropy,
    mes_cross_entropy_with_gradients,
    reweight_dual,
    reweight_features,
    tangent_loss,
)


def exercise(device):
    generator = torch.Generator(device).manual_seed(0)
    for batch, classes in ((3, 7), (5, 1023), (2, 9001)):
        z, z_dot, v, v_dot = (
            torch.randn(batch, classes, generator=generator, device=device).requires_grad_() for _ in range(4)
        )
        y = torch.randint(classes, (batch,), generator=generator, device=device)
        mask = torch.rand(batch, classes, generator=generator, device=device) < 0.5
        for beta in (None, 0.9, mask, Bernoulli.draw(0.9, device)):
            mes_cross_entropy(z, v, y, beta, reduction="mean", label_smoothing=0.1).backward()
            mes_cross_entropy_with_gradients(z, v, y, beta)
            tangent_loss(z, z_dot, v, y, beta, v_dot, reduction="mean").backward()
        reweight_features(z, v).sum().backward()
        sum(part.sum() for part in reweight_dual(z, z_dot, v)).backward()
        reweight_features(z[:, 1:] * 1, v[:, 1:], inplace=True).sum().backward()


if __name__ == "__main__":
    with backend("triton"):
        exercise("cuda")
    torch.cuda.synchronize()
