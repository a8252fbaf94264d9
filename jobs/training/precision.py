"""Faster training on a device: half precision, memory layout, compilation."""

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
    """Applies the settings "precision", "channels_last" and "compile" on one device.

    Weights, gradients and the optimizer's state stay in float32; matrix products and convolutions are computed in the
    chosen precision (torch.autocast). fp16 needs a loss scale (torch.amp.GradScaler), whose state the caller saves.
    """

    def __init__(self, settings: Settings, device: torch.device) -> None:
        self.device = device
        self.dtype = choose_precision(settings.precision, device)
        self._settings = settings

    def autocast(self) -> torch.autocast:
        """Return the context in which to compute a batch's loss or metrics."""
        return torch.autocast(self.device.type, dtype=self.dtype, enabled=self.dtype is not torch.float32)

    def scaler(self) -> GradScaler:
        """Return the loss scaler for fp16; for other precisions, a disabled one."""
        return GradScaler(self.device.type, enabled=self.dtype is torch.float16)

    def lay_out(self, model: nn.Module) -> bool:
        """Convert the model's weights to channels_last if the setting is true, or if it is "auto" and the model has 2D
        convolutions. Returns whether they were converted; if so, convert the model's batches with `arrange`."""
        wanted = self._settings.channels_last
        if wanted == "auto":
            wanted = any(isinstance(part, nn.Conv2d | nn.ConvTranspose2d) for part in model.modules())
        if wanted:
            model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # missing in torch's stubs
        return wanted

    def compiled(self, model: nn.Module) -> nn.Module:
        """Return the module to call: the model compiled by torch.compile if the settings say so, else the model itself.
        Compiled models of the same class and shapes share kernels."""
        if not self._settings.compile:
            return model
        # With dynamic=None, torch compiles a kernel for all sizes once it sees a second batch size. The kernel used
        # would then depend on the batches that this process trained before, so resuming would not be exact.
        dynamic = False if self._settings.deterministic else None
        compiled: nn.Module = torch.compile(model, dynamic=dynamic)  # type: ignore[assignment]  # typed as Callable
        return compiled


def arrange(batch: Any) -> Any:
    """Convert a batch's images (floating-point tensors with 4 dimensions) to channels_last."""

    def channels_last(tensor: Tensor) -> Tensor:
        images = tensor.ndim == 4 and tensor.is_floating_point()
        return tensor.contiguous(memory_format=torch.channels_last) if images else tensor

    return map_tensors(batch, channels_last)


def choose_precision(wanted: str, device: torch.device) -> torch.dtype:
    """Return the dtype for "auto", "fp32", "bf16" or "fp16" on a device. auto: bf16 if the hardware supports it,
    otherwise fp16 on a GPU and fp32 on a CPU. Raises JobError for bf16 on a GPU that does not support it."""
    if wanted != "auto":
        if wanted == "bf16" and device.type == "cuda" and not torch.cuda.is_bf16_supported():
            name = torch.cuda.get_device_name(device)
            raise JobError(f'precision: {name} has no "bf16"; allowed here are "auto", "fp16" and "fp32"')
        return PRECISIONS[wanted]
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    return torch.bfloat16 if device.type == "cpu" and _cpu_computes_bf16() else torch.float32


def _cpu_computes_bf16() -> bool:
    """Return whether this CPU can multiply in bfloat16. If not, torch converts values, which is slower than fp32."""
    if hasattr(torch.cpu, "get_capabilities"):
        capabilities = torch.cpu.get_capabilities()
        return any(capabilities.get(name) for name in ("avx512_bf16", "amx_bf16"))
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
