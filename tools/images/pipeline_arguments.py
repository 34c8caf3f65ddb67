"""Keyword arguments of a diffusers pipeline - prompts, labels, guidance, size - checked against its signature before sampling."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from edm_deploy.errors import InputError, UnsupportedError
from edm_deploy.numerics.seeds import check_seed
from edm_deploy.pipelines.prompt_encoding import truncated_prompts
from edm_deploy.runtime.denoiser import EngineDenoiser
from edm_deploy.runtime.manifest import ShapeRange

NUM_IMAGES = 16  # without prompts, labels or num_images


@dataclass(frozen=True, kw_only=True)
class GenerationRequest:
    """The images to sample; prompts and labels are assigned to images cyclically.

    Attributes:
        prompts: For a text-conditional model.
        negative_prompt: Prompt of the unconditional prediction of classifier-free guidance; None is the pipeline's default, usually empty.
        labels: For a class-conditional model; if empty, labels are drawn at random from the seed.
        guidance: Guidance scale; None is the pipeline's default.
        height, width: In pixels. One of them sets both; None for both is the model's native size.
        num_images: Number of images; None is one for each prompt or label, or 16.
        steps: Inference steps.
        scheduler: Name as in edm_deploy.pipelines.schedulers.SCHEDULERS; None is DDIM for a pixel-space diffusion model, else the pipeline's scheduler.
        seed: Seed of the initial noise.
    """

    prompts: tuple[str, ...] = ()
    negative_prompt: str | None = None
    labels: tuple[int, ...] = ()
    guidance: float | None = None
    height: int | None = None
    width: int | None = None
    num_images: int | None = None
    steps: int = 20
    scheduler: str | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.count < 1 or self.steps < 1:
            raise InputError(f"{self.count} images in {self.steps} steps: expected at least 1 of each.")
        check_seed(self.seed)

    @property
    def count(self) -> int:
        """Number of images."""
        return len(self.prompts or self.labels) or NUM_IMAGES if self.num_images is None else self.num_images


class PipelineArguments:
    """Translates a GenerationRequest into the keyword arguments of one pipeline.

    Args:
        pipe: A pipeline of diffusers or of edm_deploy, around `denoiser`.
        denoiser: Its engine.
        request: The images to sample.

    Raises:
        InputError: The pipeline does not accept part of the request, or requires something that the request lacks.
        UnsupportedError: A text pipeline without text encoders, or a pipeline that starts from images.
    """

    def __init__(self, pipe: Any, denoiser: EngineDenoiser, request: GenerationRequest) -> None:
        self.pipe, self.denoiser, self.request = pipe, denoiser, request
        self.name = type(pipe).__name__
        self.parameters = inspect.signature(pipe.__call__).parameters
        self.family, self.config = denoiser.family, denoiser.manifest.config
        self.classes = self._classes()
        self._check_input_images()
        self._check_prompts()
        self._check_labels()
        self._check_guidance()
        self._check_size()

    @property
    def scale(self) -> float:
        """Guidance scale; 1 is off."""
        if "guidance_scale" not in self.parameters:
            return 1.0
        return float(self.parameters["guidance_scale"].default) if self.request.guidance is None else self.request.guidance

    @property
    def samples_per_image(self) -> int:
        """Samples of the engine's batch per image: 2 with classifier-free guidance (conditional and unconditional), else 1."""
        return 2 if self._guidance_kind == "classifier-free" and self.scale > 1 else 1

    def images_at_once(self, allowed: ShapeRange) -> ShapeRange:
        """Images per call of the pipeline, from the batch range of the engine's profile.

        Raises:
            InputError: The profile has no room for one image.
        """
        most = allowed.max // self.samples_per_image
        if most < 1:
            raise InputError(
                f"Guidance {self.scale:g} takes two samples an image; the engine's batch is {allowed.max}. "
                "Build it again with --batch 1:2:8, or use --guidance 1."
            )
        least = min(-(-allowed.min // self.samples_per_image), most)
        return ShapeRange(least, most, most)

    def keywords(self, start: int, count: int, generator: torch.Generator) -> dict[str, Any]:
        """Keyword arguments for images `start` to `start + count - 1`, without the number of steps and the generator."""
        # Both or none: with one alone, diffusers samples at the model's native size.
        height, width = self.request.height or self.request.width, self.request.width or self.request.height
        keywords: dict[str, Any] = {"guidance_scale": self.request.guidance, "height": height, "width": width}
        if "use_resolution_binning" in self.parameters:
            keywords["use_resolution_binning"] = False  # PixArt would round to one of its own sizes, which the engine may not accept
        if "prompt" in self.parameters:
            keywords["prompt"] = cycle(self.request.prompts, start, count)
            keywords["negative_prompt"] = None if self.request.negative_prompt is None else [self.request.negative_prompt] * count
        elif "batch_size" in self.parameters:
            keywords |= {"batch_size": count} | self._inputs(start, count, generator)
        else:
            keywords["class_labels"] = self._labels(start, count, generator)
        return {name: value for name, value in keywords.items() if value is not None}

    def notes(self) -> list[str]:
        """One warning for each prompt that the text encoder truncates."""
        return [
            f"the prompt {prompt[:40] + '...'!r} has {tokens} tokens; the text encoder reads the first {most} and ignores the rest."
            for prompt, tokens, most in truncated_prompts(self.pipe, [*self.request.prompts, *filter(None, [self.request.negative_prompt])])
        ]

    @property
    def _guidance_kind(self) -> str:
        return self.family.guidance(self.config).kind

    def _classes(self) -> int | None:
        embedder = self.pipe.components.get("class_embedder")
        return int(embedder.config.num_classes) if embedder is not None else self.family.classes(self.config)

    def _labels(self, start: int, count: int, generator: torch.Generator) -> list[int]:
        if self.request.labels:
            return cycle(self.request.labels, start, count)
        assert self.classes is not None  # a pipeline without prompt and batch_size is class-conditional
        return torch.randint(self.classes, (count,), generator=generator).tolist()

    def _inputs(self, start: int, count: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
        if self.request.labels:
            return {"class_labels": torch.tensor(cycle(self.request.labels, start, count), device=self.denoiser.device)}
        random = self.family.random_conditioning(self.config, count, generator)
        return {name: value.to(self.denoiser.device) for name, value in random.items()}

    def _check_input_images(self) -> None:
        if needed := [name for name in ("image", "mask_image") if name in self.parameters]:
            raise UnsupportedError(
                f"A {self.name} starts from images ({', '.join(needed)}), which this command does not take. "
                f"Sample in Python: edm_deploy.load_pipeline(...)(prompt=..., {', '.join(f'{name}=...' for name in needed)})."
            )

    def _check_prompts(self) -> None:
        if "prompt" not in self.parameters:
            if self.request.prompts or self.request.negative_prompt:
                remedy = "Choose a class with --class-label." if self.classes else "Leave the prompt out."
                raise InputError(f"--prompt: a {self.name} takes no text. {remedy}")
            return
        if not self.request.prompts:
            raise InputError(f"A {self.name} samples images from a prompt. Add --prompt TEXT, or --prompts FILE.")
        if not any(part is not None for name, part in self.pipe.components.items() if name.startswith("text_encoder")):
            raise UnsupportedError(
                f"This {self.name} was saved without text encoders, so it cannot encode a prompt. Name a pipeline that has them with --source."
            )

    def _check_labels(self) -> None:
        if self.request.labels and self.classes is None:
            raise InputError(f"--class-label: a {self.name} of a {self.family.class_name} takes no class here. Leave it out.")
        for label in self.request.labels:
            if not 0 <= label < (self.classes or 0):
                raise InputError(f"--class-label {label}: this model has classes 0 to {(self.classes or 0) - 1}.")

    def _check_guidance(self) -> None:
        if self.request.guidance is not None and ("guidance_scale" not in self.parameters or self._guidance_kind == "none"):
            raise InputError(f"--guidance: this {self.family.class_name} is not guided in a {self.name}. Leave it out.")
        if self.request.guidance is not None and self.request.guidance < 0:
            raise InputError(f"--guidance {self.request.guidance:g}: expected 0 or more; 1 is off.")
        if self.request.negative_prompt and self.samples_per_image == 1:
            raise InputError(
                "--negative-prompt needs classifier-free guidance, which is off here. Leave it out, or raise --guidance above 1."
            )

    def _check_size(self) -> None:
        unit = int(getattr(self.pipe, "vae_scale_factor", 1)) * self.family.size_multiple(self.config)
        for name in ("height", "width"):
            size = getattr(self.request, name)
            if size is None:
                continue
            if name not in self.parameters:
                raise InputError(f"--{name}: a {self.name} samples images of a fixed size. Leave it out.")
            if size < unit or size % unit:
                raise InputError(f"--{name} {size}: expected a multiple of {unit} pixels for this model.")


def cycle(values: Sequence[Any], start: int, count: int) -> list[Any]:
    """`count` elements of `values` from index `start` on, starting again at the first after the last."""
    return [values[index % len(values)] for index in range(start, start + count)]
