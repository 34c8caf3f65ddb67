"""What a request conditions a model on: its prompt, label, guidance and size, as rows of graph inputs."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from edm_deploy.errors import InputError, UnsupportedError
from edm_deploy.network.family import SAMPLE, TIMESTEP, Config, Family
from edm_deploy.network.graph_names import SCALE_INPUT
from edm_deploy.pipelines.prompt_encoding import EMBEDDER_WEIGHTS, class_table, truncated_prompts
from edm_deploy.pipelines.rebuild import text_pipeline
from edm_deploy.runtime.manifest import Manifest
from edm_deploy.serving.interface import ImageRequest
from edm_deploy.serving.sample import Row

LABELS = "class_labels"


@dataclass(frozen=True)
class Encoded:
    """The conditioning of a request, encoded once for all of its images.

    Attributes:
        conditional: [1, ...] by graph input, without the inputs that a label decides.
        unconditional: The same of the second row of classifier-free guidance; None for one row.
        scale: Guidance scale.
    """

    conditional: Row
    unconditional: Row | None
    scale: float


class Conditioning:
    """Encodes the conditioning of requests for one model.

    Args:
        manifest: The engine's manifest.
        family: Family of the model.
        home: Directory of the pipeline's other components; None where it has none.
        device: Device of the engine. Text encoders run on the CPU.
        scale: The default guidance scale of the model's pipeline; None is the family's.

    Raises:
        UnsupportedError: The model takes an input that no request has.
        ArtifactError: A component cannot be read.
    """

    def __init__(self, manifest: Manifest, family: Family, home: Path | None, device: torch.device, scale: float | None = None) -> None:
        self.family, self.manifest, self.device = family, manifest, device
        self.config: Config = manifest.config
        guidance = family.guidance(self.config)
        self.kind = guidance.kind
        self.scale = guidance.scale if scale is None else scale
        self._names = [declared.name for declared in manifest.inputs if declared.name not in (SAMPLE, TIMESTEP.name)]
        texts = [name for name in family.text_inputs if name in self._names]
        has_table = home is not None and (home / EMBEDDER_WEIGHTS).is_file()
        self._table = class_table(home / EMBEDDER_WEIGHTS) if home is not None and has_table else None
        self._text: Any = text_pipeline(home) if texts and home is not None and not has_table else None
        self._tokenizers = _tokenizers_of(self._text)
        self._refuse(texts)

    @property
    def takes_prompt(self) -> bool:
        """Whether a prompt is required."""
        return self._text is not None

    @property
    def classes(self) -> int | None:
        """Number of labels; None where the model takes none."""
        return len(self._table) - 1 if self._table is not None else self.family.classes(self.config)

    def scale_of(self, request: ImageRequest) -> float:
        """Guidance scale of a request; 1 where the model is not guided."""
        if self.kind == "none":
            return 1.0
        return self.scale if request.guidance is None else request.guidance

    def rows(self, request: ImageRequest) -> int:
        """Rows of an image in each call: 2 with classifier-free guidance (conditional and unconditional), else 1."""
        return 2 if self.kind == "classifier-free" and self.scale_of(request) > 1 else 1

    def check(self, request: ImageRequest) -> None:
        """Raises InputError where the model does not take the request's prompt, label or guidance."""
        name = self.family.class_name
        if self.takes_prompt and request.prompt is None:
            raise InputError(f"This {name} samples images from a prompt. Add a prompt.")
        if not self.takes_prompt and (request.prompt or request.negative_prompt):
            remedy = "Choose a class with label." if self.classes else "Leave the prompt out."
            raise InputError(f"prompt: this {name} takes no text. {remedy}")
        if request.label is not None and not 0 <= request.label < (self.classes or 0):
            expected = f"this model has classes 0 to {self.classes - 1}" if self.classes else f"this {name} takes no class"
            raise InputError(f"label {request.label}: {expected}. Choose another, or leave it out.")
        if request.guidance is not None and self.kind == "none":
            raise InputError(f"guidance: this {name} is not guided. Leave it out.")
        if request.negative_prompt and self.rows(request) == 1:
            raise InputError("negative_prompt needs classifier-free guidance, which is off. Leave it out, or raise guidance above 1.")
        if self._text is not None:
            for prompt, count, longest in truncated_prompts(self._tokenizers, [request.prompt or "", request.negative_prompt or ""]):
                raise InputError(f"The prompt {prompt[:40] + '...'!r} has {count} tokens; the text encoder takes {longest}. Shorten it.")

    @torch.no_grad()
    def encode(self, request: ImageRequest, sized: Config) -> Encoded:
        """The conditioning of a checked request.

        Args:
            request: The request.
            sized: The model's config with the request's `sample_size`.
        """
        # Inputs that are neither text nor labels are functions of the size, and the same for any generator.
        drawn = self.family.random_conditioning(sized, 1, torch.Generator().manual_seed(0))
        fixed = {name: value for name, value in drawn.items() if name not in self.family.text_inputs and name != LABELS}
        if SCALE_INPUT in self._names:
            fixed[SCALE_INPUT] = torch.full((1,), self.scale_of(request))
        conditional, unconditional = self._encoded_text(request)
        both = self.rows(request) == 2
        first = self._converted({**fixed, **conditional})
        return Encoded(first, self._converted({**fixed, **unconditional}) if both else None, self.scale_of(request))

    @torch.no_grad()
    def rows_of(self, encoded: Encoded, request: ImageRequest, generator: torch.Generator) -> list[Row]:
        """The rows of one image, unconditional first, with its label.

        Args:
            encoded: What `encode` returned.
            request: The request.
            generator: Draws a label where the request has none.
        """
        label: dict[str, Tensor] = {}
        no_label: dict[str, Tensor] = {}
        if self.classes is not None:
            drawn = torch.randint(self.classes, (1,), generator=generator) if request.label is None else torch.tensor([request.label])
            none = torch.tensor([self.classes])
            if self._table is None:
                label, no_label = {LABELS: drawn}, {LABELS: none}
            else:
                tokens = self.family.text_inputs[0]
                label, no_label = {tokens: self._table[drawn][:, None]}, {tokens: self._table[none][:, None]}
        conditional = {**encoded.conditional, **self._converted(label)}
        if encoded.unconditional is None:
            return [conditional]
        return [{**encoded.unconditional, **self._converted(no_label)}, conditional]

    def memory(self, request: ImageRequest) -> int:
        """Bytes of the conditioning of a request and its images at most."""
        sizes = {dim: allowed.max for dim, allowed in self.manifest.profile.items()} | {"batch": 1}
        element = 8  # the widest type
        row = 0
        for declared in self.manifest.inputs[2:]:
            count = element
            for dim in declared.dims:
                count *= dim if isinstance(dim, int) else sizes[dim]
            row += count
        return row * self.rows(request) * (1 + (request.count if self.classes is not None else 0))

    def _encoded_text(self, request: ImageRequest) -> tuple[Mapping[str, Tensor], Mapping[str, Tensor]]:
        if self._text is None:
            return {}, {}
        conditional, unconditional = self.family.encode_prompts(self.config, self._text, [request.prompt or ""])
        if request.negative_prompt:
            unconditional, _ = self.family.encode_prompts(self.config, self._text, [request.negative_prompt])
        return conditional, unconditional

    def _converted(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        kinds = {declared.name: declared.dtype(self.manifest.torch_dtype) for declared in self.manifest.inputs}
        return {name: value.detach().to(self.device, kinds[name]).contiguous() for name, value in values.items() if name in kinds}

    def _refuse(self, texts: list[str]) -> None:
        name = self.family.class_name
        if texts and self._text is None and self._table is None:
            raise UnsupportedError(
                f"This {name} is conditioned on {' and '.join(texts)}, and its pipeline has no text encoders. Name a pipeline that has them with --source."
            )
        if self.family.extra_channels(self.config, 1, torch.Generator().manual_seed(0)) is not None:
            raise UnsupportedError(f"This {name} takes a mask or a picture as further channels (inpainting), which no request has here.")
        if LABELS in self._names and self.classes is None:
            raise UnsupportedError(f"This {name} takes an embedding as class_labels, which no request has here.")


def _tokenizers_of(pipeline: Any) -> Any:
    """The tokenizers of a text pipeline, copied, as `truncated_prompts` takes them: one tokenizer in two threads at once raises an error."""
    if pipeline is None:
        return None
    tokenizers = {
        name: copy.deepcopy(part) for name, part in pipeline.components.items() if name.startswith("tokenizer") and part is not None
    }
    return SimpleNamespace(components=tokenizers, encode_prompt=pipeline.encode_prompt)
