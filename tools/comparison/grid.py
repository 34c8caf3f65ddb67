"""The experiments of a comparison: each recipe with its settings and passes, at each scheme; and the checks before any of them runs."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from calibration import recipes
from calibration.base_pass import check_passes
from calibration.recipe import Recipe
from edm_deploy import registry
from edm_deploy.errors import InputError, UnsupportedError
from edm_deploy.pipelines.source import Source
from edm_deploy.runtime.capabilities import BackendCapabilities, check_scheme
from edm_deploy_tools.common.recipe_settings import RecipeChoice, preset_path

ALL = "all"
PUBLISHED = "published"  # instead of a preset name: the recipe's published defaults
SHORT = "demo"  # preset of efficientdm; other recipes have `demo-<recipe>`
SCHEME = re.compile(r"[Ww](\d+)[Aa](\d+)")


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A recipe in a comparison.

    Attributes:
        label: As the user wrote it: `efficientdm`, `static:calibrator=mse`, `efficientdm+tac`.
        recipe: Name of the recipe.
        settings: `key=value` each; they override the preset.
        passes: Names of the passes, in the order in which they are composed.
        preset: Name of a shipped preset, or None.
        config: A TOML file of the user, or None.
    """

    label: str
    recipe: str
    settings: tuple[str, ...] = ()
    passes: tuple[str, ...] = ()
    preset: str | None = None
    config: Path | None = None


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """One recipe at one scheme with one seed.

    Attributes:
        entry: The recipe and its settings, as the user wrote them.
        weight_bits, act_bits: Bits of the scheme.
        rows: Rows of the activation tables.
        seed: Random seed of the recipe.
        budget: Seconds of calibration and training; None for a recipe that does not train.
        recipe: The recipe with all settings.
        passes: The passes with all settings.
    """

    entry: Entry
    weight_bits: int
    act_bits: int
    rows: int
    seed: int
    budget: float | None
    recipe: Recipe
    passes: tuple[Any, ...]

    @property
    def scheme(self) -> str:
        """For example `W4A4`."""
        return f"W{self.weight_bits}A{self.act_bits}"

    @property
    def folder(self) -> Path:
        """Its directory, relative to that of the comparison."""
        name = re.sub(r"[^\w.+=-]", "_", self.entry.label) + (f"-seed{self.seed}" if self.seed else "")
        return Path("cells") / self.scheme / name

    def identity(self, model: str, prompts: Sequence[str] = ()) -> dict[str, Any]:
        """Everything that determines the artifact, except the machine; JSON.

        Args:
            model: Digest of the float model.
            prompts: Prompts of the user, if any.
        """
        passes = {chosen.name: chosen.settings() for chosen in self.passes}
        settings = self.recipe.settings()
        identity = {"model": model, "recipe": self.recipe.name, "settings": settings, "passes": passes, "budget_seconds": self.budget}
        return identity | ({"prompts": list(prompts)} if prompts else {})

    def command(self, model: str, out: Path, *, prompts: Path | None = None) -> list[str]:
        """The command that makes its artifact."""
        options: dict[str, Any] = {"--out": out, "--recipe": self.entry.recipe, "--rows": self.rows, "--seed": self.seed}
        options |= {"--weight-bits": self.weight_bits, "--act-bits": self.act_bits, "--preset": self.entry.preset}
        options |= {"--config": self.entry.config, "--prompts": prompts}
        options |= {"--budget": None if self.budget is None else f"{self.budget}s"}
        arguments = [text for name, value in options.items() if value is not None for text in (name, str(value))]
        arguments += [text for setting in self.entry.settings for text in ("--set", setting)]
        arguments += [text for name in self.entry.passes for text in ("--with", name)]
        return [sys.executable, "-m", "edm_deploy_tools.cli", "finetune" if self.budget else "calibrate", model, *arguments]


def entries_of(text: str, presets: Mapping[str, str]) -> list[Entry]:
    """Entries of `a,b:key=value,efficientdm+tac`, or of `all`, which is every recipe without passes.

    Args:
        text: Value of `--recipes`.
        presets: By recipe the name of a preset, `published`, or a TOML file; other recipes use `demo-<recipe>` if it is shipped.

    Raises:
        UnsupportedError: An unknown recipe or preset.
        InputError: No recipe, a recipe named twice, or a preset for a recipe that is not compared.
    """
    labels = registry.names(recipes) if text.strip() == ALL else [part.strip() for part in text.split(",") if part.strip()]
    if not labels:
        raise InputError(f"--recipes {text!r} names none. Name some with commas, or write {ALL}.")
    if twice := [label for label in labels if labels.count(label) > 1]:
        raise InputError(f"--recipes names {twice[0]!r} twice. Name it once.")
    entries = [_entry(label, presets) for label in labels]
    if unused := sorted(set(presets) - {entry.recipe for entry in entries}):
        raise InputError(f"--preset {unused[0]}={presets[unused[0]]}: {unused[0]} is not among --recipes. Leave it out or add the recipe.")
    return entries


def presets_of(texts: Sequence[str]) -> dict[str, str]:
    """Presets by recipe, from texts `recipe=name`; InputError if one has another form."""
    presets = {}
    for text in texts:
        recipe, equals, preset = text.partition("=")
        if not equals or not recipe or not preset:
            raise InputError(f"--preset {text!r}: expected recipe=name, such as efficientdm=demo or qat=mine.toml.")
        presets[recipe.replace("_", "-")] = preset
    return presets


def _entry(label: str, presets: Mapping[str, str]) -> Entry:
    described, *passes = label.split("+")
    name, *settings = described.split(":")
    name = name.replace("_", "-")
    registry.load(recipes, name, "RECIPE")
    preset = presets.get(name) or _short_preset(name)
    if preset == PUBLISHED:
        preset = None
    config = Path(preset) if preset and preset.endswith(".toml") else None
    if preset and config is None:
        preset_path(preset)
    return Entry(label=label, recipe=name, settings=tuple(settings), passes=tuple(passes), preset=None if config else preset, config=config)


def _short_preset(recipe: str) -> str | None:
    shipped = {path.stem for path in preset_path(SHORT).parent.glob("*.toml")}
    name = SHORT if recipe == "efficientdm" else f"{SHORT}-{recipe}"
    return name if name in shipped else None


def schemes_of(text: str) -> list[tuple[int, int]]:
    """Bits of weights and activations from `W8A8,W4A4`; InputError if one has another form."""
    matches = [SCHEME.fullmatch(part.strip()) for part in text.split(",")]
    if None in matches or not matches:
        raise InputError(f"--bits {text!r}: expected schemes separated by commas, such as W8A8,W4A4.")
    bits = [(int(match[1]), int(match[2])) for match in matches if match]
    return list(dict.fromkeys(bits))


def experiments_of(
    entries: Sequence[Entry], schemes: Sequence[tuple[int, int]], *, rows: int, seeds: int, budget: float
) -> list[Experiment]:
    """All experiments, scheme by scheme; a recipe that does not train runs once, with seed 0.

    Raises:
        InputError: A setting or bits that a recipe does not accept, or passes that it does not compose with.
    """
    if seeds < 1:
        raise InputError(f"--seeds {seeds}: expected 1 or more.")
    experiments = []
    for weight_bits, act_bits in schemes:
        for entry in entries:
            for seed in range(seeds):
                recipe, passes = RecipeChoice(
                    recipe=entry.recipe,
                    preset=entry.preset,
                    config=entry.config,
                    flags={"weight_bits": weight_bits, "act_bits": act_bits, "rows": rows, "seed": seed},
                    overrides=entry.settings,
                    passes=entry.passes,
                ).build()
                check_passes(passes, recipe)
                experiments.append(
                    Experiment(
                        entry=entry,
                        weight_bits=weight_bits,
                        act_bits=act_bits,
                        rows=rows,
                        seed=seed,
                        budget=budget if recipe.trains else None,
                        recipe=recipe,
                        passes=passes,
                    )
                )
                if not recipe.trains:
                    break
    return experiments


def check_experiments(
    experiments: Sequence[Experiment], source: Source, targets: Sequence[BackendCapabilities], *, forward_seconds: float, batch: int
) -> None:
    """Refuse experiments that are impossible with this model, before any of them runs.

    Args:
        experiments: All experiments.
        source: The float model.
        targets: Backends that must support every scheme.
        forward_seconds: Wall time of one forward pass of the float model.
        batch: Samples in that forward pass.

    Raises:
        UnsupportedError: The backend does not support a scheme, or a recipe does not support this model.
        InputError: The budget is shorter than the forward passes of calibration.
    """
    for experiment in experiments:
        for target in targets:
            check_scheme(target, experiment.weight_bits, experiment.act_bits)
        try:
            experiment.recipe.structure(source)
        except UnsupportedError as err:
            raise UnsupportedError(f"{experiment.entry.label} cannot quantize {source.name}: {err}") from err
        needed = forward_seconds / batch * experiment.recipe.calibration_samples * experiment.rows
        if experiment.budget is not None and experiment.budget <= needed:
            raise InputError(
                f"--budget {experiment.budget:.4g}s is too small for {experiment.entry.label}: the forward passes of its calibration alone "
                f"({experiment.recipe.calibration_samples} samples, {experiment.rows} rows) take about {needed:.0f} s here. Set a --budget well above that."
            )
