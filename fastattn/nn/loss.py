"""The masked reconstruction losses as modules."""

from __future__ import annotations

from torch import Tensor, nn

from fastattn import losses


class _MaskedLoss(nn.Module):
    def __init__(
        self,
        *,
        patch_size: int | None = None,
        reduction: str = "masked_mean",
        normalize_target: bool = False,
        eps: float = 1e-6,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        losses.check_options(patch_size, reduction, normalize_target, eps)
        self.patch_size = patch_size
        self.reduction = reduction
        self.normalize_target = normalize_target
        self.eps = eps
        self.backend = backend

    def extra_repr(self) -> str:
        parts = [f"reduction={self.reduction!r}"]
        if self.patch_size is not None:
            parts.insert(0, f"patch_size={self.patch_size}")
        if self.normalize_target:
            parts.append(f"normalize_target=True, eps={self.eps}")
        if self.backend is not None:
            parts.append(f"backend={self.backend!r}")
        return ", ".join(parts)


class MaskedMSELoss(_MaskedLoss):
    """Squared error over the elements that a mask counts: MAE's loss (He et al. 2022, section 3).

    Args and errors: `fastattn.masked_mse_loss`. Call it with (input, target, mask).
    """

    def forward(self, input: Tensor, target: Tensor, mask: Tensor) -> Tensor:
        """A scalar, or the shape of `input` for reduction "none"; see `fastattn.masked_mse_loss`."""
        return losses.masked_mse_loss(
            input,
            target,
            mask,
            patch_size=self.patch_size,
            reduction=self.reduction,
            normalize_target=self.normalize_target,
            eps=self.eps,
            backend=self.backend,
        )


class MaskedL1Loss(_MaskedLoss):
    """Absolute error over the elements that a mask counts: SimMIM's loss (Xie et al. 2022, section 3.4, equation 1).

    Args and errors: `fastattn.masked_l1_loss`. Call it with (input, target, mask).
    """

    def forward(self, input: Tensor, target: Tensor, mask: Tensor) -> Tensor:
        """A scalar, or the shape of `input` for reduction "none"; see `fastattn.masked_l1_loss`."""
        return losses.masked_l1_loss(
            input,
            target,
            mask,
            patch_size=self.patch_size,
            reduction=self.reduction,
            normalize_target=self.normalize_target,
            eps=self.eps,
            backend=self.backend,
        )


class MaskedSmoothL1Loss(_MaskedLoss):
    """Squared below `beta`, absolute above, over the elements that a mask counts.

    Args and errors: `fastattn.masked_smooth_l1_loss`. Call it with (input, target, mask).
    """

    def __init__(
        self,
        *,
        patch_size: int | None = None,
        reduction: str = "masked_mean",
        beta: float = 1.0,
        normalize_target: bool = False,
        eps: float = 1e-6,
        backend: str | None = None,
    ) -> None:
        super().__init__(
            patch_size=patch_size, reduction=reduction, normalize_target=normalize_target, eps=eps, backend=backend
        )
        self.beta = losses.check_beta(beta)

    def forward(self, input: Tensor, target: Tensor, mask: Tensor) -> Tensor:
        """A scalar, or the shape of `input` for reduction "none"; see `fastattn.masked_smooth_l1_loss`."""
        return losses.masked_smooth_l1_loss(
            input,
            target,
            mask,
            patch_size=self.patch_size,
            reduction=self.reduction,
            beta=self.beta,
            normalize_target=self.normalize_target,
            eps=self.eps,
            backend=self.backend,
        )

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, beta={self.beta}"
