"""What a pipeline is told for each image - prompts, labels, guidance, size -, checked against what it takes before anything is drawn."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from edm_deploy.errors import InputError, UnsupportedError
from edm_deploy.pipelines.prompt_encoding import truncated_prompts
from edm_deploy.runtime.denoiser import EngineDenoiser
from edm_deploy.runtime.manifest import ShapeRange


@dataclass(frozen=True, kw_only=True)
class GenerationRequest:
    """What images are asked for; prompts and labels are told in turn.

    Attributes:
        prompts: For a model that takes text.
        negative_prompt: What classifier-free guidance leads away from; None is the pipeline's own, mostly the empty prompt.
        labels: For a model that takes classes; none draws them from the seed.
        guidance: Scale; None is the pipeline's own.
        height, width: In pixels; None is as the other, both None the model's own.
    """

    prompts: tuple[str, ...] = ()
    negative_prompt: str | None = None
    labels: tuple[int, ...] = ()
    guidance: float | None = None
    height: int | None = None
    width: int | None = None


class PipelineArguments:
    """Tells one pipeline.

    Args:
        pipe: A diffusers pipeline or one of ours, around `denoiser`.
        denoiser: The engine in it.
        told: What its images are asked for.

    Raises:
        InputError: Something that this pipeline does not take, or nothing where it must be told.
        UnsupportedError: It should read prompts and was saved without text encoders, or it starts from pictures.
    """

    def __init__(self, pipe: Any, denoiser: EngineDenoiser, told: GenerationRequest) -> None:
        self.pipe, self.denoiser, self.told = pipe, denoiser, told
        self.name = type(pipe).__name__
        self.takes = inspect.signature(pipe.__call__).parameters
        self.family, self.config = denoiser.family, denoiser.manifest.config
        self.classes = self._classes()
        self._check_pictures()
        self._check_prompts()
        self._check_labels()
        self._check_guidance()
        self._check_size()

    @property
    def scale(self) -> float:
        """Of the guidance."""
        if "guidance_scale" not in self.takes:
            return 1.0
        return float(self.takes["guidance_scale"].default) if self.told.guidance is None else self.told.guidance

    @property
    def halves(self) -> int:
        """How many samples of the engine's batch an image takes: guidance without a classifier runs it with and without the conditioning."""
        return 2 if self._kind == "classifier-free" and self.scale > 1 else 1

    def images_at_once(self, allowed: ShapeRange) -> ShapeRange:
        """How many images a call may draw, by the engine's profile.

        Raises:
            InputError: Not one.
        """
        most = allowed.max // self.halves
        if most < 1:
            raise InputError(
                f"Guidance {self.scale:g} takes two samples an image; the engine's batch is {allowed.max}. "
                "Build it again with --batch 1:2:8, or use --guidance 1."
            )
        least = min(-(-allowed.min // self.halves), most)
        return ShapeRange(least, most, most)

    def arguments(self, start: int, count: int, generator: torch.Generator) -> dict[str, Any]:
        """Keyword arguments of the pipeline for `count` images from image `start` on, beside steps and generator."""
        # Both or none: of one alone diffusers draws the model's own size.
        height, width = self.told.height or self.told.width, self.told.width or self.told.height
        told: dict[str, Any] = {"guidance_scale": self.told.guidance, "height": height, "width": width}
        if "use_resolution_binning" in self.takes:
            told["use_resolution_binning"] = False  # PixArt would draw at the nearest of its own sizes, which the engine may not take
        if "prompt" in self.takes:
            told["prompt"] = cycle(self.told.prompts, start, count)
            told["negative_prompt"] = None if self.told.negative_prompt is None else [self.told.negative_prompt] * count
        elif "batch_size" in self.takes:
            told |= {"batch_size": count} | self._inputs(start, count, generator)
        else:
            told["class_labels"] = self._labels(start, count, generator)
        return {name: value for name, value in told.items() if value is not None}

    def notes(self) -> list[str]:
        """What the user should hear: prompts that are cut off."""
        return [
            f"the prompt {prompt[:40] + '...'!r} has {tokens} tokens; the text encoder reads the first {most}, and the rest is not drawn."
            for prompt, tokens, most in truncated_prompts(self.pipe, [*self.told.prompts, *filter(None, [self.told.negative_prompt])])
        ]

    @property
    def _kind(self) -> str:
        return self.family.guidance(self.config).kind

    def _classes(self) -> int | None:
        embedder = self.pipe.components.get("class_embedder")
        return int(embedder.config.num_classes) if embedder is not None else self.family.classes(self.config)

    def _labels(self, start: int, count: int, generator: torch.Generator) -> list[int]:
        if self.told.labels:
            return cycle(self.told.labels, start, count)
        assert self.classes is not None  # a pipeline that takes labels alone has a model that knows them
        return torch.randint(self.classes, (count,), generator=generator).tolist()

    def _inputs(self, start: int, count: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
        if self.told.labels:
            return {"class_labels": torch.tensor(cycle(self.told.labels, start, count), device=self.denoiser.device)}
        drawn = self.family.random_conditioning(self.config, count, generator)
        return {name: value.to(self.denoiser.device) for name, value in drawn.items()}

    def _check_pictures(self) -> None:
        if needed := [name for name in ("image", "mask_image") if name in self.takes]:
            raise UnsupportedError(
                f"A {self.name} starts from pictures ({', '.join(needed)}), which are not given here. "
                f"Draw in Python: edm_deploy.load_pipeline(...)(prompt=..., {', '.join(f'{name}=...' for name in needed)})."
            )

    def _check_prompts(self) -> None:
        if "prompt" not in self.takes:
            if self.told.prompts or self.told.negative_prompt:
                mend = "Name a class with --class-label." if self.classes else "Leave the prompt out."
                raise InputError(f"--prompt: a {self.name} takes no text. {mend}")
            return
        if not self.told.prompts:
            raise InputError(f"A {self.name} draws what a prompt asks for. Add --prompt TEXT, or --prompts FILE.")
        if not any(part is not None for name, part in self.pipe.components.items() if name.startswith("text_encoder")):
            raise UnsupportedError(
                f"This {self.name} was saved without text encoders, so it reads no prompt. Name one that has them with --source."
            )

    def _check_labels(self) -> None:
        if self.told.labels and self.classes is None:
            raise InputError(f"--class-label: a {self.name} of a {self.family.class_name} takes no class here. Leave it out.")
        for label in self.told.labels:
            if not 0 <= label < (self.classes or 0):
                raise InputError(f"--class-label {label}: this model knows 0 to {(self.classes or 0) - 1}.")

    def _check_guidance(self) -> None:
        if self.told.guidance is not None and ("guidance_scale" not in self.takes or self._kind == "none"):
            raise InputError(f"--guidance: this {self.family.class_name} is not guided in a {self.name}. Leave it out.")
        if self.told.guidance is not None and self.told.guidance < 0:
            raise InputError(f"--guidance {self.told.guidance:g}: expected 0 or more; 1 is off.")
        if self.told.negative_prompt and self.halves == 1:
            raise InputError(
                "--negative-prompt acts through classifier-free guidance, which is off here. Leave it out, or raise --guidance above 1."
            )

    def _check_size(self) -> None:
        unit = int(getattr(self.pipe, "vae_scale_factor", 1)) * self.family.size_multiple(self.config)
        for name in ("height", "width"):
            size = getattr(self.told, name)
            if size is None:
                continue
            if name not in self.takes:
                raise InputError(f"--{name}: a {self.name} draws images of its own size. Leave it out.")
            if size < unit or size % unit:
                raise InputError(f"--{name} {size}: this model draws multiples of {unit} pixels.")


def cycle(values: Sequence[Any], start: int, count: int) -> list[Any]:
    """`count` of `values` from number `start` on, from the beginning again after the last."""
    return [values[index % len(values)] for index in range(start, start + count)]
