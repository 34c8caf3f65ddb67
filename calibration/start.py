"""Start a recipe from an artifact: what must agree with it, the settings that are taken from it, and the record of the chain."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from calibration.base_pass import Pass
from calibration.recipe import Recipe
from calibration.run.options import RunOptions
from edm_deploy.artifact.artifact import Artifact
from edm_deploy.errors import InputError
from edm_deploy.numerics.codes import WEIGHT_ONLY_BITS

CHAIN = "started_from"  # entry of a provenance: the earlier artifacts, oldest first
RECORDED = ("recipe", "settings", "passes", "folded_pre_scales", "rotations", "steps_done", "wall_seconds")  # of each


@dataclass(frozen=True)
class Taken:
    """Settings that a recipe takes from the artifact that it starts from."""

    weight_bits: int
    act_bits: int
    rows: int

    @classmethod
    def of(cls, artifact: Artifact) -> Taken:
        """Bits of most sites, and the number of sampling steps that the rows were calibrated for.

        Raises:
            InputError: The artifact has no quantized sites.
        """
        if not artifact.sites:
            raise InputError("The artifact to start from has no quantized layers. Start from the float model: leave --from out.")
        schemes = [(site.weight_bits, site.activation.bits if site.activation else WEIGHT_ONLY_BITS) for site in artifact.sites.values()]
        weight_bits, act_bits = max(sorted(set(schemes)), key=schemes.count)
        settings = artifact.provenance.get("settings")
        rows = settings.get("rows") if isinstance(settings, dict) else None
        return cls(weight_bits, act_bits, rows if isinstance(rows, int) else len(artifact.timesteps))


def recipe_taking(recipe: Recipe, artifact: Artifact, chosen: Sequence[str] = ()) -> Recipe:
    """The recipe with the artifact's bits and rows.

    Args:
        recipe: With its settings.
        artifact: That the run starts from.
        chosen: Names of the settings that the user chose.

    Raises:
        InputError: A chosen setting differs from the artifact's.
    """
    for name, value in vars(Taken.of(artifact)).items():
        if name in chosen and getattr(recipe, name) != value:
            raise InputError(
                f"{name} is {getattr(recipe, name)}, and the artifact to start from has {value}, which does not change. "
                f"Leave {name} out, or start from the float model."
            )
    return replace(recipe, **vars(Taken.of(artifact)))


def check_start(artifact: Artifact, recipe: Recipe, passes: Sequence[Pass], options: RunOptions, teacher_hash: str) -> None:
    """Refuse to start from an artifact that does not fit the run.

    Args:
        artifact: That the run starts from.
        recipe: With the artifact's bits and rows.
        passes: Of the run.
        options: Of the run.
        teacher_hash: Digest of the float model.

    Raises:
        InputError: The message names the conflict.
    """
    if not recipe.starts_from_artifact:
        raise InputError(f"Recipe {recipe.name!r} calibrates anew, so that it cannot start from an artifact. Use a recipe that trains.")
    recipe_taking(recipe, artifact, tuple(vars(Taken.of(artifact))))
    if artifact.provenance.get("teacher_sha256") != teacher_hash:
        found = str(artifact.provenance.get("teacher_sha256", "no hash"))[:12]
        raise InputError(
            f"The artifact to start from was made of another model ({found}, this one is {teacher_hash[:12]}). Name the model that it was made of."
        )
    if artifact.correction is not None:
        raise InputError(
            "The artifact to start from was made with pass tac, whose correction belongs to the network as it was. "
            "Start from an artifact without it, and add --with tac to this run."
        )
    for each in passes:
        if each.student_leads or any(getattr(type(each), hook) is not getattr(Pass, hook) for hook in ("calibrated", "timesteps", "specs")):
            raise InputError(f"Pass {each.name!r} works on calibration, which a run from an artifact does not repeat. Leave it out.")
    if options.fold_time and not artifact.folded:
        raise InputError("--fold-time: the artifact to start from quantizes the layers that it would fold. Leave it out.")
    if recipe.rotate != "off":
        raise InputError(f"rotate is {recipe.rotate}, and the artifact to start from has its structure already. Leave rotate out.")
    if recipe.comparison_of_layers and any(map(_has_folded, chain_with(artifact))):
        raise InputError(
            f"The artifact to start from has pre-scales or rotations folded into its layers, so that single layers no longer compare with the float model's, as "
            f"{recipe.name} with these settings does. Set {recipe.comparison_of_layers}."
        )


def chain_with(artifact: Artifact) -> list[dict[str, Any]]:
    """The record of an artifact and of those that it was started from, oldest first: JSON."""
    provenance = artifact.provenance
    earlier = provenance.get(CHAIN, ())
    return [*earlier, {"digest": artifact.digest} | {name: provenance[name] for name in RECORDED if name in provenance}]


def _has_folded(step: Mapping[str, Any]) -> bool:
    """Whether pre-scales or rotations were folded into neighbouring layers, whose own outputs then differ from the float model's."""
    return not str(step.get("folded_pre_scales", "0 of")).startswith("0 of") or not str(
        step.get("rotations", " 0 of them folded")
    ).endswith(" 0 of them folded")
