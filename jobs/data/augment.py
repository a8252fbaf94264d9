"""Augment whole batches of images on their device.

Each step changes a batch as torchvision.transforms.v2 changes one image, with equal results for equal random numbers.
All random numbers of an epoch are drawn at once, on the CPU and from a separate generator. So they are the same on any
device, and to resume an epoch at any batch, only its seed is needed. No step synchronises with the GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from jobs.errors import JobError

BITS = 31  # number of bits of a drawn integer
BYTE = torch.tensor(255, dtype=torch.uint8)
COPIED_ONE_BY_ONE = 96 * 96  # pixels; from this size on, a CPU copies crops faster one by one than in one gather
GREY = (0.2989, 0.587, 0.114)  # weights of red, green and blue (ITU-R BT.601), rounded as in torchvision

Drawn = dict[str, Tensor]  # random numbers by name, one row per example
Size = int | tuple[int, int]  # pixels: one number for both sides, or (height, width)
Range = float | tuple[float, float] | None


class Step:
    """One operation on a batch of images (n, channels, height, width) in torch.channels_last: uint8, or float32 after
    `Normalize`."""

    once = False  # True: not random and keeps uint8, so a leading step can be applied once to the whole data set

    def parts(self) -> Sequence[Step]:
        """Return the steps that this step consists of."""
        return (self,)

    def draw(self, count: int, generator: torch.Generator, epoch: int = 0) -> Drawn:
        """Draw the random numbers for `count` examples, on the CPU. epoch: number in the lineage, from 0."""
        return {}

    def apply(self, images: Tensor, drawn: Mapping[str, Tensor]) -> Tensor:
        """Return the changed images. drawn: the rows from `draw` for these images, on the same device."""
        raise JobError(f"{type(self).__name__} has no apply(images, drawn); it must return the changed images")


class Pad(Step):
    """Pad each side, like torchvision's Pad. mode: "constant" (black), "edge", "reflect" or "symmetric"."""

    once = True
    MODES = ("constant", "edge", "reflect", "symmetric")

    def __init__(self, padding: int, mode: str = "constant") -> None:
        """Raises JobError for another mode or a negative padding."""
        if mode not in self.MODES:
            raise JobError(f"padding mode {mode!r} is not one of {', '.join(self.MODES)}")
        if padding < 0:
            raise JobError(f"padding is {padding} pixels; it must be 0 or more")
        self.padding, self.mode = padding, mode

    def apply(self, images: Tensor, drawn: Mapping[str, Tensor]) -> Tensor:
        from torchvision.transforms.v2 import functional

        shorter = min(images.shape[2:])
        if self.padding > shorter - (self.mode == "reflect") and self.mode in ("reflect", "symmetric"):
            raise JobError(f"images of {shorter} pixels can't be padded by {self.padding} pixels in mode {self.mode}")
        padded: Tensor = functional.pad(images, [self.padding], padding_mode=self.mode)
        return padded


class RandomCrop(Step):
    """Crop at a uniformly random position."""

    def __init__(self, size: Size) -> None:
        self.size = _both(size)

    def draw(self, count: int, generator: torch.Generator, epoch: int = 0) -> Drawn:
        return _places(count, generator)

    def apply(self, images: Tensor, drawn: Mapping[str, Tensor]) -> Tensor:
        (height, width), (count, channels, rows, columns) = self.size, images.shape
        if height > rows or width > columns:
            raise JobError(f"a crop of {height}x{width} pixels is larger than the images, {rows}x{columns}")
        tops, lefts = rows - height + 1, columns - width + 1  # number of possible positions
        top, left = place(drawn["y"], tops), place(drawn["x"], lefts)
        pixels = images.permute(0, 2, 3, 1).contiguous()
        if images.device.type == "cpu" and height * width >= COPIED_ONE_BY_ONE:
            cropped = pixels.new_empty(count, height, width, channels)
            for target, source, y, x in zip(cropped, pixels, top.tolist(), left.tolist(), strict=True):
                target.copy_(source[y : y + height, x : x + width])
            return cropped.permute(0, 3, 1, 2)
        image, row, column, channel = pixels.stride()
        # A view of all windows of all images; a single gather then copies the chosen windows, whole rows at a time.
        windows = pixels.as_strided(
            (count, tops, lefts, height, width, channels), (image, row, column, row, column, channel)
        )
        return windows[torch.arange(count, device=images.device), top, left].permute(0, 3, 1, 2)


class PadCrop(RandomCrop):
    """Pad once, then crop at random in each epoch, like torchvision's RandomCrop(size, padding, padding_mode=mode)."""

    def __init__(self, size: Size, padding: int, mode: str = "constant") -> None:
        super().__init__(size)
        self._pad = Pad(padding, mode)

    def parts(self) -> Sequence[Step]:
        return (self._pad, RandomCrop(self.size))

    def apply(self, images: Tensor, drawn: Mapping[str, Tensor]) -> Tensor:
        return super().apply(self._pad.apply(images, {}), drawn)


class CenterCrop(Step):
    """Crop the center, like torchvision's CenterCrop; smaller images are padded with black."""

    once = True

    def __init__(self, size: Size) -> None:
        self.size = _both(size)

    def apply(self, images: Tensor, drawn: Mapping[str, Tensor]) -> Tensor:
        from torchvision.transforms.v2 import functional

        cropped: Tensor = functional.center_crop(images, list(self.size))
        return cropped


class Resize(Step):
    """Resize (bilinear, antialiased), like torchvision's Resize. A single number sets the shorter side."""

    once = True

    def __init__(self, size: Size) -> None:
        self.size = [size] if isinstance(size, int) else list(_both(size))

    def apply(self, images: Tensor, drawn: Mapping[str, Tensor]) -> Tensor:
        from torchvision.transforms.v2 import functional

        resized: Tensor = functional.resize(images, self.size, antialias=True)
        return resized


class Flip(Step):
    """Mirror left and right with probability 1/2, like torchvision's RandomHorizontalFlip."""

    def draw(self, count: int, generator: torch.Generator, epoch: int = 0) -> Drawn:
        return {"flipped": torch.randint(2, (count,), generator=generator).bool()}

    def apply(self, images: Tensor, drawn: Mapping[str, Tensor]) -> Tensor:
        flipped = drawn["flipped"].view(-1, 1, 1, 1)
        if images.dtype != torch.uint8:
            return torch.where(flipped, images.flip(3), images)
        # a ^ ((a ^ b) & mask) takes a fifth of the time of `where`, which processes bytes one by one.
        return images.flip(3).bitwise_xor_(images).bitwise_and_(flipped * BYTE).bitwise_xor_(images)


class AlternatingFlip(Flip):
    """Mirror each example in every second epoch, so two successive epochs show both orientations. Whether this happens
    in odd or even epochs is random for each example (Jordan 2024, arXiv:2404.00498)."""

    def __init__(self, seed: int = 0) -> None:
        """seed: chooses odd or even epochs for each example, for the whole lineage."""
        self._seed = seed

    def draw(self, count: int, generator: torch.Generator, epoch: int = 0) -> Drawn:
        first = torch.randint(2, (count,), generator=torch.Generator().manual_seed(self._seed))
        return {"flipped": (first + epoch) % 2 == 1}


class Cutout(Step):
    """Set a square at a uniformly random position inside the image to 0 (DeVries and Taylor 2017, as in Page 2018).
    Before `Normalize`, 0 is black; after it, 0 is the data set's mean."""

    def __init__(self, size: int) -> None:
        if size < 1:
            raise JobError(f"cutout size is {size} pixels; it must be 1 or more")
        self.size = size

    def draw(self, count: int, generator: torch.Generator, epoch: int = 0) -> Drawn:
        return _places(count, generator)

    def apply(self, images: Tensor, drawn: Mapping[str, Tensor]) -> Tensor:
        height, width = images.shape[2:]
        if self.size > min(height, width):
            raise JobError(f"a cutout of {self.size} pixels is larger than the images, {height}x{width}")
        rows, columns = self._covered(height, drawn["y"]), self._covered(width, drawn["x"])
        return images.masked_fill((rows[:, :, None] & columns[:, None, :])[:, None], 0)

    def _covered(self, side: int, bits: Tensor) -> Tensor:
        """Return which rows (or columns) the square covers, (n, side) bool."""
        first = place(bits, side - self.size + 1)[:, None]
        pixels = torch.arange(side, device=bits.device)
        return (pixels >= first) & (pixels < first + self.size)


class Normalize(Step):
    """Compute (value - mean) / std for each channel. uint8 images are first scaled to float32 in [0, 1]."""

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        """Raises JobError unless mean and std have equal lengths and every std is positive."""
        if len(mean) != len(std) or not all(s > 0 for s in std):
            raise JobError(f"mean {list(mean)}, std {list(std)}: each channel needs a mean and a std above 0")
        self.mean, self.std = tuple(map(float, mean)), tuple(map(float, std))
        self._constants: dict[tuple[torch.device, bool], tuple[Tensor, Tensor]] = {}

    def apply(self, images: Tensor, drawn: Mapping[str, Tensor]) -> Tensor:
        if images.shape[1] != len(self.mean):
            raise JobError(f"Normalize has {len(self.mean)} channels, but the images have {images.shape[1]}")
        scale, shift = self._on(images.device, images.is_floating_point())
        channels_last = images.permute(0, 2, 3, 1).is_contiguous()
        if images.device.type == "cpu" and images.dtype in (torch.uint8, torch.float32) and channels_last:
            # Multiply whole rows of pixels: on a CPU, broadcasting over the innermost (channel) dimension is slow.
            normalized = images.float() if images.dtype == torch.uint8 else images.clone()
            width = images.shape[3]
            rows = normalized.permute(0, 2, 3, 1).view(-1, width * len(self.mean))
            rows.mul_(scale.flatten().repeat(width)).add_(shift.flatten().repeat(width))
            return normalized
        return images.mul(scale).add_(shift)  # two passes over the data, including the conversion to float32

    def _on(self, device: torch.device, floating: bool) -> tuple[Tensor, Tensor]:
        """Return scale and shift, (1, channels, 1, 1). They are cached, because copying them to a GPU synchronises."""
        if (device, floating) not in self._constants:
            mean, std = (torch.tensor(v, dtype=torch.float64).view(1, -1, 1, 1) for v in (self.mean, self.std))
            scale = 1 / std if floating else 1 / (255 * std)
            self._constants[device, floating] = (scale.float().to(device), (-mean / std).float().to(device))
        return self._constants[device, floating]


def place(bits: Tensor, places: int | Tensor) -> Tensor:
    """Map drawn integers to 0, ..., places - 1 with equal probability (relative error up to places / 2**31)."""
    return (bits * places) >> BITS


def _places(count: int, generator: torch.Generator) -> Drawn:
    """Draw integers for `place`, which maps them to positions once the size of the images is known."""
    return {name: torch.randint(2**BITS, (count,), generator=generator) for name in ("y", "x")}


def _both(size: Size) -> tuple[int, int]:
    height, width = (size, size) if isinstance(size, int) else size
    if height < 1 or width < 1:
        raise JobError(f"size is {height}x{width} pixels; both must be 1 or more")
    return height, width


# --- colours


class ColorJitter(Step):
    """Change brightness, contrast, saturation and hue, like torchvision's ColorJitter on a single uint8 image.

    A number b means factors from max(0, 1 - b) to 1 + b (hue: shifts from -b to b, as fractions of the colour circle).
    A pair gives the lowest and highest value, None means no change. Images are uint8 with 1 or 3 channels; with 1
    channel, saturation and hue have no effect."""

    def __init__(
        self, brightness: Range = None, contrast: Range = None, saturation: Range = None, hue: Range = None
    ) -> None:
        """Raises JobError for a negative number, a factor below 0 or a hue shift of more than half the circle."""
        given = {"brightness": brightness, "contrast": contrast, "saturation": saturation, "hue": hue}
        self._ranges = {name: _range(name, value) for name, value in given.items() if value is not None}

    def draw(self, count: int, generator: torch.Generator, epoch: int = 0) -> Drawn:
        drawn = {
            name: low + (high - low) * torch.rand(count, generator=generator)
            for name, (low, high) in self._ranges.items()
        }
        drawn["order"] = torch.rand(count, len(self._ranges), generator=generator).argsort(dim=1)
        return drawn

    def apply(self, images: Tensor, drawn: Mapping[str, Tensor]) -> Tensor:
        if images.dtype != torch.uint8 or images.shape[1] not in (1, 3):
            raise JobError(f"ColorJitter: {images.shape[1]} channels of {images.dtype}; it needs 1 or 3 of torch.uint8")
        images = images.clone()
        for next_change in drawn["order"].unbind(dim=1):
            for number, name in enumerate(self._ranges):
                rows = torch.nonzero(next_change == number).flatten()
                if len(rows):
                    images[rows] = CHANGES[name](images[rows], drawn[name][rows].view(-1, 1, 1, 1))
        return images


def _hue(images: Tensor, shift: Tensor) -> Tensor:
    """Shift the hue in HSV space (Smith 1978)."""
    if images.shape[1] == 1:
        return images
    red, green, blue = scaled = images.float().div_(255).unbind(dim=1)
    value = torch.stack(scaled).amax(dim=0)
    chroma = value - torch.stack(scaled).amin(dim=0)
    safe = torch.where(chroma == 0, 1.0, chroma)
    sixth = torch.where(value == green, 2 + (blue - red) / safe, 4 + (red - green) / safe)
    sixth = torch.where(value == red, (green - blue) / safe, sixth) + 6 * shift[:, 0]
    distance = [(number + sixth).remainder(6) for number in (5, 3, 1)]  # from each primary colour on the circle
    shifted = [value - chroma * torch.minimum(d, 4 - d).clamp_(0, 1) for d in distance]
    # like torchvision, multiply by 255.999, so that each integer gets an equal share of [0, 1]
    return torch.stack(shifted, dim=1).mul_(255.999).to(torch.uint8)


CHANGES: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = {
    "brightness": lambda images, factor: _blend(images, 0.0, factor),
    "contrast": lambda images, factor: _blend(images, _grey(images).mean(dim=(1, 2, 3), keepdim=True), factor),
    "saturation": lambda images, factor: images if images.shape[1] == 1 else _blend(images, _grey(images), factor),
    "hue": _hue,
}


def _grey(images: Tensor) -> Tensor:
    """Return the luminance, rounded down, (n, 1, h, w) float32."""
    if images.shape[1] == 1:
        return images.float()
    red, green, blue = images.unbind(dim=1)
    return red.mul(GREY[0]).add_(green, alpha=GREY[1]).add_(blue, alpha=GREY[2]).floor_().unsqueeze(1)


def _blend(images: Tensor, other: Tensor | float, factor: Tensor) -> Tensor:
    return images.mul(factor).add_(other * (1 - factor)).clamp_(0, 255).to(torch.uint8)


def _range(name: str, value: float | tuple[float, float]) -> tuple[float, float]:
    hue = name == "hue"
    middle, lowest, highest = (0.0, -0.5, 0.5) if hue else (1.0, 0.0, float("inf"))
    if isinstance(value, tuple):
        low, high = value
    else:
        low, high = middle - value, middle + value
        low = max(low, lowest) if value >= 0 and not hue else low
    if not lowest <= low <= high <= highest:
        allowed = "from 0 to 0.5, or a pair (low, high) in -0.5 to 0.5" if hue else "0 or more, or a pair (low, high)"
        raise JobError(f"ColorJitter: {name} {value} is not allowed; it must be {allowed}")
    return low, high
