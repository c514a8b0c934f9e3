"""Latents of images by a frozen autoencoder in diffusers' format (AutoencoderKL), encoded once and kept on disk.

Stored are mean and standard deviation (fp16) of every image and, if training mirrors images, of every mirrored image, since
an encoder does not commute with mirroring. A batch draws from them afresh: (mean + std z - shift) * scale, with shift and
scale of the autoencoder's config (sd-vae-ft-*: 0 and 0.18215). Called by images.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import Tensor

from ...alignment.noise import normal
from ...base.built_once import built_once
from ...base.errors import DataError, EnvironmentProblem
from ...base.files import read_json, sha256_file, sha256_json, write_json
from ..image_settings import ImageSettings

if TYPE_CHECKING:
    from .images import ImageSet

ENCODED = 64
DECODED = 128
RESIDENT_BYTES = 8 * 2**30


class Autoencoder(Protocol):
    """What is used of diffusers' AutoencoderKL."""

    config: Any

    def encode(self, images: Tensor) -> Any: ...
    def decode(self, latents: Tensor) -> Any: ...


class Latents:
    """Encoded images of one part. `shape`: (C, H, W) of a latent."""

    def __init__(self, folder: Path, vae: Autoencoder, vae_folder: Path, vae_sha256: str, channels: int) -> None:
        facts = read_json(folder / "latents.json")
        self.vae, self.folder, self.sha256, self._channels = vae, vae_folder, vae_sha256, channels
        self.shape: tuple[int, int, int] = tuple(facts["shape"])
        # [flips, rows, mean and std, C, H, W]
        size = (facts["flips"], facts["count"], 2, *self.shape)
        self._table: Any = np.memmap(folder / "latents.f16", dtype=np.float16, mode="c", shape=size)
        self._resident: dict[torch.device, Tensor] = {}
        self.scale, self.shift = scaling(vae.config)

    def draw(self, index_B: Tensor, flipped_B: Tensor, seed: int, place_B: Tensor, device: torch.device) -> Tensor:
        """fp32 [B, C, H, W]: a draw from the posterior of every row; noise by (seed, place)."""
        if device.type != "cpu" and self._table.nbytes <= RESIDENT_BYTES:
            if device not in self._resident:
                self._resident[device] = torch.from_numpy(np.ascontiguousarray(self._table)).to(device)
            moments = self._resident[device][flipped_B.to(device).long(), index_B.to(device)]
        else:
            rows = self._table[flipped_B.cpu().long().numpy(), index_B.cpu().numpy()]
            moments = torch.from_numpy(np.ascontiguousarray(rows)).to(device)
        mean_BCHW, std_BCHW = moments.float().unbind(1)
        noise = normal(seed, place_B.to(device), self.shape)
        return (mean_BCHW + std_BCHW * noise - self.shift) * self.scale

    def decode(self, latents_BCHW: Tensor) -> Tensor:
        """fp32 [B, C, H, W] pixels in [-1, 1] (clipped)."""
        return decode_latents(self.vae, latents_BCHW, self._channels)


def decode_latents(vae: Autoencoder, latents_BCHW: Tensor, channels: int) -> Tensor:
    """fp32 pixels in [-1, 1] with `channels` channels, in portions."""
    scale, shift = scaling(vae.config)
    with torch.inference_mode():
        parts = [vae.decode(part / scale + shift).sample.float() for part in latents_BCHW.float().split(DECODED)]
    images = torch.cat(parts).clamp(-1.0, 1.0).clone()
    return images if images.shape[1] == channels else images.mean(1, keepdim=True)


def scaling(config: Any) -> tuple[float, float]:
    """(scale, shift) that bring latents to about unit size."""
    return float(config.scaling_factor), float(getattr(config, "shift_factor", None) or 0.0)


def load_vae(folder: Path, device: torch.device) -> tuple[Autoencoder, str]:
    """(the frozen autoencoder, hash of its files). EnvironmentProblem ENV-020 without diffusers, DataError DATA-044 if the
    folder holds none."""
    try:
        from diffusers import AutoencoderKL  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise EnvironmentProblem(
            "images.vae needs the package diffusers: pip install 'quietgoose[images]'", code="ENV-020"
        ) from error
    weights = sorted(folder.glob("*.safetensors"))
    if not (folder / "config.json").is_file() or not weights:
        raise DataError(
            f"images.vae: {folder}: needs config.json and *.safetensors of an AutoencoderKL", code="DATA-044"
        )
    try:
        vae = AutoencoderKL.from_pretrained(str(folder), local_files_only=True, use_safetensors=True)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise DataError(f"images.vae: {folder}: cannot be opened ({error})", code="DATA-044") from error
    sha256 = sha256_json([sha256_file(path) for path in (folder / "config.json", *weights)])
    frozen: Any = vae.eval().requires_grad_(False)
    return frozen.to(device), sha256


def open_latents(settings: ImageSettings, sets: Sequence[ImageSet], cache: Path, device: torch.device) -> list[Latents]:
    """The latents of every set, encoded on `device` at the first call, by one autoencoder."""
    assert settings.vae is not None
    vae_folder = Path(settings.vae).expanduser()
    vae, sha256 = load_vae(vae_folder, device)
    made = []
    for images in sets:
        key = sha256_json([images.digest, sha256, settings.flip])
        folder = built_once(cache / "latents" / key[:32], lambda out, images=images: _encode(vae, images, device, out))
        made.append(Latents(folder, vae, vae_folder, sha256, images.pixel_shape[0]))
    return made


def _encode(vae: Autoencoder, images: ImageSet, device: torch.device, out: Path) -> None:
    flips = 2 if images.flip else 1
    shape: list[int] = []
    with (out / "latents.f16").open("wb") as file, torch.inference_mode():
        for flip in range(flips):
            for index_B in torch.arange(len(images)).split(ENCODED):
                pixels = images.pixels(index_B, torch.full((len(index_B),), bool(flip)), device)
                mean_std = _moments(vae, pixels)
                shape = list(mean_std.shape[2:])
                file.write(mean_std.half().cpu().numpy().tobytes())
    facts: Mapping[str, Any] = {"shape": shape, "flips": flips, "count": len(images), "images": images.digest}
    write_json(out / "latents.json", facts)


def _moments(vae: Autoencoder, pixels_BCHW: Tensor) -> Tensor:
    """fp32 [B, 2, C, H, W]: mean and standard deviation; a grey image is shown to a colour encoder as colour."""
    if pixels_BCHW.shape[1] == 1 and vae.config.in_channels == 3:
        pixels_BCHW = pixels_BCHW.expand(-1, 3, -1, -1)
    posterior = vae.encode(pixels_BCHW).latent_dist
    return torch.stack([posterior.mean.float(), posterior.std.float()], dim=1)
