"""Rebuild a diffusers pipeline around an engine: its text encoders, tokenizers and VAE with the engine as the denoiser."""

from __future__ import annotations

import contextlib
import inspect
import logging
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline

from edm_deploy.errors import ArtifactError, UnsupportedError, first_line
from edm_deploy.network.family import Config, Family
from edm_deploy.pipelines.custom import ClassConditionalPipeline, ClassEmbedder, UnconditionalPipeline
from edm_deploy.pipelines.schedulers import refuse_no_steps, scheduler_from_config, scheduler_named
from edm_deploy.pipelines.source import local_directory
from edm_deploy.storage.directories import INDEX_FILE, SCHEDULER_FILE, SOURCE_KEY, other_components, read_json
from edm_deploy.storage.variants import variant_in, variant_of

LARGE = 4 << 30  # bytes; larger text encoders are loaded in bfloat16 (T5-XXL takes 19 GB in float32)
CUSTOM = {"ClassConditionalPipeline": ClassConditionalPipeline}
TEXT = ("text_encoder", "tokenizer")
UNCONDITIONAL_INPUTS = ("class_labels",)  # that UnconditionalPipeline passes on, besides sample and timestep


def _not_torchvision(record: logging.LogRecord) -> bool:
    return "requires torchvision (not installed)" not in record.getMessage()


# diffusers imports image processors that are not used here, and transformers logs each one that falls back to PIL.
logging.getLogger("transformers.utils.import_utils").addFilter(_not_torchvision)


def pipeline_from_directory(
    directory: Path, component: str, denoiser: Any, *, scheduler: str | None = None, source: str | Path | None = None
) -> DiffusionPipeline:
    """Rebuild the source pipeline around an engine.

    Args:
        directory: Directory with the pipeline's JSON files and possibly its other components.
        component: The denoiser's name in the pipeline, `unet` or `transformer`.
        denoiser: The replacement of the denoiser.
        scheduler: Name of another scheduler; None is the source's.
        source: Directory or hub id of the other components; None uses `directory` where it holds them, else the source that it names.

    Raises:
        ArtifactError: The directory holds no pipeline, or a component cannot be read.
        UnsupportedError: A component of the pipeline is in none of these places.
    """
    index = index_with_components(directory, denoiser.family, denoiser.manifest.config, source)
    config = read_json(directory / SCHEDULER_FILE, what="pipeline")
    chosen = scheduler_named(scheduler, config) if scheduler else scheduler_from_config(str(index["scheduler"][1]), config)
    refuse_no_steps(chosen)
    if not other_components(index, component):
        return UnconditionalPipeline(denoiser, chosen)
    home = home_of_components(directory, index, component, source)
    dtype = denoiser.dtype if denoiser.device.type == "cuda" else torch.float32
    class_name = str(index["_class_name"])
    if class_name in CUSTOM:
        return _class_conditional(home, denoiser, chosen, dtype).to(denoiser.device)
    loaded = load_components(home, class_name, {component: None, "scheduler": chosen}, dtype)
    # Constructed again rather than assigned: some pipelines read the denoiser's config in __init__.
    accepted = set(inspect.signature(type(loaded).__init__).parameters)
    settings = {key: value for key, value in index.items() if key in accepted and not isinstance(value, list)}
    return type(loaded)(**{**loaded.components, component: denoiser}, **settings).to(denoiser.device)


def index_with_components(directory: Path, family: Family, config: Config, source: str | Path | None) -> dict[str, Any]:
    """model_index.json of the pipeline to rebuild: that of the engine, or that of `source` if the engine was saved without other components.

    Args:
        directory: An engine's directory.
        family: Family of the engine's model.
        config: Config of the model.
        source: As in `pipeline_from_directory`.

    Raises:
        ArtifactError: There is no pipeline in `directory` or `source`.
        UnsupportedError: The model needs conditioning, and no component of the pipeline provides it.
    """
    index, component = read_json(directory / INDEX_FILE, what="pipeline"), family.component
    if source is not None and not other_components(index, component):
        index = read_json(local_directory(source) / INDEX_FILE, what="diffusers pipeline")
    needed = [declared.name for declared in family.inputs(config)[2:] if declared.name not in UNCONDITIONAL_INPUTS]
    if (needed or component != "unet") and not other_components(index, component):
        reason = f"needs {' and '.join(needed)}" if needed else "needs a VAE"
        raise UnsupportedError(
            f"{directory} is an engine of a {family.class_name}, which {reason}, and its pipeline was saved without the components that provide it. "
            + _remedy(directory, component)
        )
    return index


def pipeline_guidance(index: Mapping[str, Any]) -> float | None:
    """The default guidance scale of the pipeline that a model_index.json names; None where it has none."""
    name = str(index.get("_class_name"))
    pipeline_class = CUSTOM.get(name) or getattr(diffusers, name, None)
    parameter = inspect.signature(pipeline_class.__call__).parameters.get("guidance_scale") if pipeline_class else None
    return float(parameter.default) if parameter is not None and isinstance(parameter.default, int | float) else None


def text_pipeline(directory: Path) -> DiffusionPipeline | None:
    """A pipeline with its text encoders and tokenizers only; None where it has none, or has no `encode_prompt`.

    Raises:
        ArtifactError: A component cannot be read.
    """
    index = read_json(directory / INDEX_FILE, what="diffusers pipeline")
    pipeline_class = getattr(diffusers, str(index["_class_name"]), None)
    parts = [name for name, value in index.items() if isinstance(value, list) and value[0]]
    text = [name for name in parts if name.startswith(TEXT) and (directory / name).is_dir()]
    if not any(name.startswith("text_encoder") for name in text) or not hasattr(pipeline_class, "encode_prompt"):
        return None
    size = sum(file.stat().st_size for name in text for file in (directory / name).glob("*.safetensors"))
    return load_components(
        directory,
        str(index["_class_name"]),
        {name: None for name in parts if name not in text},
        torch.bfloat16 if size > LARGE else torch.float32,
    )


def load_components(directory: Path, class_name: str, components: Mapping[str, Any], dtype: torch.dtype) -> DiffusionPipeline:
    """Load a diffusers pipeline, with `components` in place of those in the directory; None leaves one out.

    Raises:
        ArtifactError: A component cannot be read.
        UnsupportedError: diffusers has no pipeline of this class.
    """
    pipeline_class = getattr(diffusers, class_name, None)
    if pipeline_class is None:
        raise UnsupportedError(
            f"diffusers {diffusers.__version__} has no pipeline {class_name!r}. Install the version that it was saved with."
        )
    index = read_json(directory / INDEX_FILE, what="diffusers pipeline")
    # diffusers reports components that the pipeline was saved without (such as SD3's third text encoder) as missing unless they are passed as None.
    left_out = {name: None for name, value in index.items() if isinstance(value, list) and not value[0]}
    parts = {**left_out, **components}
    try:
        with without_loading_messages():
            options = {"variant": variant_in(directory), "torch_dtype": dtype, "use_safetensors": True, "local_files_only": True}
            return pipeline_class.from_pretrained(directory, **options, **parts)
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, AttributeError, ImportError) as err:
        raise ArtifactError(
            f"{directory} cannot be read as a {class_name}: {first_line(err)}. Download or save the pipeline again."
        ) from err


def home_of_components(directory: Path, index: Mapping[str, Any], component: str, source: str | Path | None) -> Path:
    """The directory of the pipeline's other components: `source`, the engine's, or the pipeline that the model was quantized from.

    Args:
        directory: An engine's directory.
        index: What `index_with_components` returned.
        component: The denoiser's name in the pipeline.
        source: As in `pipeline_from_directory`.

    Raises:
        UnsupportedError: A component is in none of these places.
    """
    others = other_components(index, component)
    location = source or (directory if all((directory / name).is_dir() for name in others) else index.get(SOURCE_KEY))
    remedy = _remedy(directory, component)
    if location is None:
        raise UnsupportedError(
            f"{directory} has no {others[0]!r}, which a {index['_class_name']} needs, and names no source pipeline. {remedy}"
        )
    try:
        home = local_directory(location)
    except ArtifactError as err:
        raise UnsupportedError(f"{directory} takes its {others[0]!r} from {location}, which does not exist. {remedy}") from err
    if missing := [name for name in others if not (home / name).is_dir()]:
        raise UnsupportedError(f"{home} has no {missing[0]!r}, which a {index['_class_name']} needs. {remedy}")
    return home


def _remedy(directory: Path, component: str) -> str:
    return (
        "Name the pipeline with --source or load_pipeline(..., source=...), build the engine with --with-pipeline, "
        f"or assign the engine to a loaded pipeline: pipe.{component} = edm_deploy.load_denoiser({str(directory)!r})."
    )


def _class_conditional(home: Path, denoiser: Any, scheduler: Any, dtype: torch.dtype) -> ClassConditionalPipeline:
    index = read_json(home / INDEX_FILE, what="pipeline")
    vae_class = getattr(diffusers, str(index["vae"][1]))
    try:
        with without_loading_messages():
            vae = vae_class.from_pretrained(home / "vae", variant=variant_of(home / "vae"), torch_dtype=dtype, use_safetensors=True)
            embedder = ClassEmbedder.from_pretrained(home / "class_embedder", torch_dtype=dtype, use_safetensors=True)
    except (OSError, ValueError, RuntimeError, KeyError) as err:
        raise ArtifactError(
            f"{home} cannot be read as a ClassConditionalPipeline: {first_line(err)}. Download or save the pipeline again."
        ) from err
    return ClassConditionalPipeline(denoiser, scheduler, vae, embedder)


@contextlib.contextmanager
def without_loading_messages() -> Iterator[None]:
    """Silence diffusers and transformers while components load, encode and run: log lines up to WARNING, progress bars, a renamed argument.

    Their messages concern a disabled safety checker, image processors without torchvision and truncated prompts, which are reported elsewhere.
    """
    level, bars = logging.root.manager.disable, [home for home in _progress_bars() if home.is_progress_bar_enabled()]
    logging.disable(logging.WARNING)
    for home in bars:
        home.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*torch_dtype", category=FutureWarning)  # older releases accept no other name
            yield
    finally:
        for home in bars:
            home.enable_progress_bar()
        logging.disable(level)


def _progress_bars() -> list[Any]:
    """The logging modules of diffusers and transformers, which switch their progress bars."""
    homes: list[Any] = [diffusers.utils.logging]
    with contextlib.suppress(ImportError):
        from transformers.utils import logging as of_transformers

        homes.append(of_transformers)
    return homes
