"""What a comparison is made of: recipes with their settings and passes, at each scheme, and what can be refused of it before anything runs."""

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
from edm_deploy_tools.common.recipe_settings import passes_with, preset_path, recipe_with

ALL = "all"
PUBLISHED = "published"  # in place of a preset: the recipe's own defaults
SHORT = "demo"  # the preset of efficientdm; of other recipes, `demo-<recipe>`
SCHEME = re.compile(r"[Ww](\d+)[Aa](\d+)")


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A recipe as it is compared.

    Attributes:
        label: As it was written: `efficientdm`, `static:calibrator=mse`, `efficientdm+tac`.
        recipe: Its name.
        settings: `key=value` each, over the preset's.
        passes: Names, in the order in which they are composed.
        preset: Name of a shipped one, or None.
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
    """One entry at one scheme from one seed.

    Attributes:
        entry: It.
        weight_bits, act_bits: The scheme's.
        rows: Of the tables.
        seed: Of everything random in the recipe.
        budget: Seconds of calibration and training, for a recipe that trains; None for one that does not.
        made: The recipe with all its settings.
        passes: With theirs.
    """

    entry: Entry
    weight_bits: int
    act_bits: int
    rows: int
    seed: int
    budget: float | None
    made: Recipe
    passes: tuple[Any, ...]

    @property
    def scheme(self) -> str:
        """`W4A4`."""
        return f"W{self.weight_bits}A{self.act_bits}"

    @property
    def folder(self) -> Path:
        """Where it stands, below the comparison's directory."""
        name = re.sub(r"[^\w.+=-]", "_", self.entry.label) + (f"-seed{self.seed}" if self.seed else "")
        return Path("cells") / self.scheme / name

    def identity(self, model: str, prompts: Sequence[str] = ()) -> dict[str, Any]:
        """All that decides what the artifact is, but the machine; json.

        Args:
            model: The float model's digest.
            prompts: The user's own, if any.
        """
        passes = {chosen.name: chosen.settings() for chosen in self.passes}
        settings = self.made.settings()
        decides = {"model": model, "recipe": self.made.name, "settings": settings, "passes": passes, "budget_seconds": self.budget}
        return decides | ({"prompts": list(prompts)} if prompts else {})

    def command(self, model: str, out: Path, *, prompts: Path | None = None) -> list[str]:
        """The process that makes its artifact."""
        options: dict[str, Any] = {"--out": out, "--recipe": self.entry.recipe, "--rows": self.rows, "--seed": self.seed}
        options |= {"--weight-bits": self.weight_bits, "--act-bits": self.act_bits, "--preset": self.entry.preset}
        options |= {"--config": self.entry.config, "--prompts": prompts}
        options |= {"--budget": None if self.budget is None else f"{self.budget}s"}
        given = [text for name, value in options.items() if value is not None for text in (name, str(value))]
        given += [text for setting in self.entry.settings for text in ("--set", setting)]
        given += [text for name in self.entry.passes for text in ("--with", name)]
        return [sys.executable, "-m", "edm_deploy_tools.cli", "finetune" if self.budget else "calibrate", model, *given]


def entries_of(text: str, presets: Mapping[str, str]) -> list[Entry]:
    """Entries of `a,b:key=value,efficientdm+tac`, or of `all`: every recipe by itself.

    Args:
        text: As `--recipes` takes it.
        presets: For a recipe the name of a preset, `published`, or a TOML file; others take `demo-<recipe>` where that is shipped.

    Raises:
        UnsupportedError: An unknown recipe or preset.
        InputError: Nothing named, or something twice, or a preset for a recipe that is not compared.
    """
    labels = registry.names(recipes) if text.strip() == ALL else [part.strip() for part in text.split(",") if part.strip()]
    if not labels:
        raise InputError(f"--recipes {text!r} names none. Name some with commas, or write {ALL}.")
    if twice := [label for label in labels if labels.count(label) > 1]:
        raise InputError(f"--recipes names {twice[0]!r} twice. Name it once.")
    entries = [_entry(label, presets) for label in labels]
    if strangers := sorted(set(presets) - {entry.recipe for entry in entries}):
        raise InputError(
            f"--preset {strangers[0]}={presets[strangers[0]]}: {strangers[0]} is not among --recipes. Leave it out or add the recipe."
        )
    return entries


def presets_of(texts: Sequence[str]) -> dict[str, str]:
    """Preset by recipe, of `recipe=name` each; InputError where one is not of that form."""
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
    """Bits of weights and activations of `W8A8,W4A4`; InputError where one is not of that form."""
    found = [SCHEME.fullmatch(part.strip()) for part in text.split(",")]
    if None in found or not found:
        raise InputError(f"--bits {text!r}: expected schemes with commas, such as W8A8,W4A4.")
    bits = [(int(match[1]), int(match[2])) for match in found if match]
    return list(dict.fromkeys(bits))


def cells_of(entries: Sequence[Entry], schemes: Sequence[tuple[int, int]], *, rows: int, seeds: int, budget: float) -> list[Experiment]:
    """Every cell, scheme by scheme; recipes that do not train once, from seed 0.

    Raises:
        InputError: A setting or bits that a recipe does not take, or passes that it does not compose with.
    """
    if seeds < 1:
        raise InputError(f"--seeds {seeds}: expected 1 or more.")
    cells = []
    for weight_bits, act_bits in schemes:
        for entry in entries:
            flags = {"weight_bits": weight_bits, "act_bits": act_bits, "rows": rows}
            of_passes = [text for text in entry.settings if "." in text.partition("=")[0]]
            of_recipe = [text for text in entry.settings if text not in of_passes]
            passes = passes_with(entry.passes, of_passes)
            for seed in range(seeds):
                made = recipe_with(
                    entry.recipe, preset=entry.preset, config=entry.config, flags=flags | {"seed": seed}, overrides=of_recipe
                )
                check_passes(passes, made)
                cells.append(
                    Experiment(
                        entry=entry,
                        weight_bits=weight_bits,
                        act_bits=act_bits,
                        rows=rows,
                        seed=seed,
                        budget=budget if made.trains else None,
                        made=made,
                        passes=passes,
                    )
                )
                if not made.trains:
                    break
    return cells


def check_cells(
    cells: Sequence[Experiment], source: Source, target: BackendCapabilities | None, *, forward_seconds: float, batch: int
) -> None:
    """Refuse what cannot be made of this model, before anything is made.

    Args:
        cells: All.
        source: The float model.
        target: Where the artifacts shall run, or None.
        forward_seconds: Of the float model.
        batch: How many samples it computed in that time.

    Raises:
        UnsupportedError: The target does not carry a scheme, or a recipe does not know this kind of model.
        InputError: The budget is less than calibration's forward passes alone take.
    """
    for cell in cells:
        if target is not None:
            check_scheme(target, cell.weight_bits, cell.act_bits)
        try:
            cell.made.structure(source)
        except UnsupportedError as err:
            raise UnsupportedError(f"{cell.entry.label} cannot quantize {source.name}: {err}") from err
        needed = forward_seconds / batch * cell.made.calibration_samples * cell.rows
        if cell.budget is not None and cell.budget <= needed:
            raise InputError(
                f"--budget {cell.budget:.4g}s is too small for {cell.entry.label}: the forward passes of its calibration alone "
                f"({cell.made.calibration_samples} samples, {cell.rows} rows) take about {needed:.0f} s here. Set a --budget well above that."
            )
