"""What makes the same training faster on a device: half precision, memory layout, compilation."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler

from jobs.data.batches import map_tensors
from jobs.errors import JobError
from orchestrator.settings.settings import Settings

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Speed:
    """The settings "precision", "channels_last" and "compile", for one device.

    Weights, gradients and the optimizer's state stay in float32; matrix products and convolutions are computed in the
    chosen precision (torch.autocast). fp16 has a loss scale (torch.amp.GradScaler), whose state the caller keeps.
    """

    def __init__(self, settings: Settings, device: torch.device) -> None:
        self.device = device
        self.dtype = choose_precision(settings.precision, device)
        self._settings = settings

    def autocast(self) -> torch.autocast:
        """The context for everything from a batch to its loss or its metrics."""
        return torch.autocast(self.device.type, dtype=self.dtype, enabled=self.dtype is not torch.float32)

    def scaler(self) -> GradScaler:
        """The loss scale of fp16; for other precisions one that does nothing."""
        return GradScaler(self.device.type, enabled=self.dtype is torch.float16)

    def lay_out(self, model: nn.Module) -> bool:
        """Put the model's weights into channels_last if the settings say so or (auto) it has 2D convolutions. Returns
        whether it did; then its batches need `arrange`."""
        wanted = self._settings.channels_last
        if wanted == "auto":
            wanted = any(isinstance(part, nn.Conv2d | nn.ConvTranspose2d) for part in model.modules())
        if wanted:
            model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # missing in torch's stubs
        return wanted

    def compiled(self, model: nn.Module) -> nn.Module:
        """The model to call: torch.compile's if the settings say so. Models of the same class and shapes share
        kernels."""
        if not self._settings.compile:
            return model
        # Otherwise torch compiles a kernel for any size when it sees a second size: the kernel of a batch would then
        # depend on the batches before it, perhaps in another process.
        dynamic = False if self._settings.deterministic else None
        compiled: nn.Module = torch.compile(model, dynamic=dynamic)  # type: ignore[assignment]  # typed as Callable
        return compiled


def arrange(batch: Any) -> Any:
    """A batch whose images (floating point, 4 dimensions) are in channels_last."""

    def channels_last(tensor: Tensor) -> Tensor:
        images = tensor.ndim == 4 and tensor.is_floating_point()
        return tensor.contiguous(memory_format=torch.channels_last) if images else tensor

    return map_tensors(batch, channels_last)


def choose_precision(wanted: str, device: torch.device) -> torch.dtype:
    """The dtype that "auto", "fp32", "bf16" or "fp16" means on a device. auto: bf16 if the hardware computes it,
    otherwise fp16 on a GPU and fp32 on a CPU. Raises JobError for bf16 on a GPU that can't compute it."""
    if wanted != "auto":
        if wanted == "bf16" and device.type == "cuda" and not torch.cuda.is_bf16_supported():
            name = torch.cuda.get_device_name(device)
            raise JobError(f'precision: {name} has no "bf16"; allowed here are "auto", "fp16" and "fp32"')
        return PRECISIONS[wanted]
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    return torch.bfloat16 if device.type == "cpu" and _cpu_computes_bf16() else torch.float32


def _cpu_computes_bf16() -> bool:
    """Has this CPU instructions for products of bfloat16? Without them torch converts, which is slower than fp32."""
    if hasattr(torch.cpu, "get_capabilities"):
        capabilities = torch.cpu.get_capabilities()
        return any(capabilities.get(name) for name in ("avx512_bf16", "amx_bf16"))
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
