"""Copies to a CUDA device for which the host does not wait."""

from __future__ import annotations

import torch
from torch import Tensor


def to_device(t: Tensor, device: str | torch.device) -> Tensor:
    """Copy a tensor of the host to a device; the host does not wait for a CUDA device.

    torch copies asynchronously from pinned memory alone, and keeps that memory until the copy has been made. Any other
    pair of devices has an ordinary copy.

    Args:
        t: The tensor.
        device: Where it is wanted.

    Returns:
        The tensor on the device, which is ``t`` itself if it is there already.

    Example:
        >>> t = torch.ones(3)
        >>> to_device(t, "cpu") is t
        True
    """
    device = torch.device(device)
    if device.type != "cuda" or t.device.type != "cpu" or t.layout != torch.strided:
        return t.to(device)
    if not t.is_pinned():
        t = torch.empty_like(t, pin_memory=True).copy_(t)  # pin_memory() refuses an expanded tensor
    return t.to(device, non_blocking=True)
