"""Build a recipe and its passes from the command line: published defaults, then a preset, a TOML file, options and `--set`, in this order."""

from __future__ import annotations

import dataclasses
import tomllib
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from edm_deploy import registry
from edm_deploy.errors import ArtifactError, InputError, UnsupportedError

PRESETS = "presets"


@dataclasses.dataclass(frozen=True, kw_only=True)
class RecipeChoice:
    """A recipe, its passes and where their settings come from, as the command line gives them.

    Attributes:
        recipe: Name of the recipe, as `edm-deploy finetune --recipe` takes it.
        preset: A file of calibration/presets, without `.toml`; None uses no preset.
        config: A TOML file of the user; None uses no file.
        flags: Settings that have an option of their own; a value of None is ignored.
        overrides: `key=value` for the recipe, `pass.key=value` for a pass; the value is read as TOML.
        passes: Names of the passes, in the order in which they are composed.
    """

    recipe: str
    preset: str | None = None
    config: Path | None = None
    flags: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    overrides: Sequence[str] = ()
    passes: Sequence[str] = ()

    def build(self) -> tuple[Any, tuple[Any, ...]]:  # a calibration.recipe.Recipe and calibration.base_pass.Pass
        """The recipe and its passes, with all settings.

        Raises:
            UnsupportedError, InputError, ArtifactError: As `recipe_with` and `passes_with`.
        """
        of_recipe, of_passes = sorted_overrides(self.overrides)
        recipe = recipe_with(self.recipe, preset=self.preset, config=self.config, flags=self.flags, overrides=of_recipe)
        return recipe, passes_with(self.passes, of_passes)

    def chosen(self) -> set[str]:
        """Names of the recipe's settings that the user chose: by an option, `--set` or a file of their own, not by a shipped preset."""
        of_recipe, _ = sorted_overrides(self.overrides)
        named = {parse_override(text)[0] for text in of_recipe} | {name for name, value in self.flags.items() if value is not None}
        return named | (set(read_toml(self.config)) if self.config else set())


def recipe_with(
    name: str,
    *,
    preset: str | None = None,
    config: Path | None = None,
    flags: Mapping[str, Any] | None = None,
    overrides: Sequence[str] = (),
) -> Any:  # a calibration.recipe.Recipe
    """An instance of recipe `name`; each argument overrides the settings of those before it.

    Args:
        name: As `edm-deploy finetune --recipe` takes it.
        preset: A file of calibration/presets, without `.toml`.
        config: A TOML file of the user.
        flags: Settings that have an option of their own; a value of None is ignored.
        overrides: `key=value`, the value in TOML.

    Raises:
        UnsupportedError: No such recipe or preset.
        InputError: An unknown key (the message names the nearest), or a value of the wrong type or outside its range.
        ArtifactError: The TOML file is missing or malformed.
    """
    import calibration.recipes

    recipe_class = registry.load(calibration.recipes, name, "RECIPE")
    settings: dict[str, Any] = {}
    if preset is not None:
        settings |= checked(recipe_class, read_toml(preset_path(preset)), where=f"preset {preset}")
    if config is not None:
        settings |= checked(recipe_class, read_toml(config), where=str(config))
    settings |= checked(
        recipe_class, {key: value for key, value in (flags or {}).items() if value is not None}, where=f"recipe {name}", option=True
    )
    settings |= checked(recipe_class, dict(parse_override(text) for text in overrides), where="--set")
    return recipe_class(**settings)


def sorted_overrides(texts: Sequence[str]) -> tuple[list[str], list[str]]:
    """Split overrides into those of the recipe, `key=value`, and those of passes, `pass.key=value`."""
    of_passes = [text for text in texts if "." in text.partition("=")[0]]
    return [text for text in texts if text not in of_passes], of_passes


def passes_with(names: Sequence[str], overrides: Sequence[str] = ()) -> tuple[Any, ...]:
    """Instances of passes, in the given order.

    Args:
        names: As `edm-deploy finetune --with` takes them.
        overrides: `pass.key=value`, the value in TOML.

    Raises:
        UnsupportedError: No such pass.
        InputError: A setting of a pass that is not in `names`, or a setting that the pass does not have.
    """
    import calibration.passes

    settings: dict[str, dict[str, Any]] = {name.replace("_", "-"): {} for name in names}
    for text in overrides:
        owner, _, override = text.partition(".")
        owner = owner.strip().replace("_", "-")
        if owner not in settings:
            raise InputError(f"--set {text}: no pass {owner!r} in this run. Add --with {owner}, or leave the setting out.")
        settings[owner] |= dict([parse_override(override)])
    classes = {name: registry.load(calibration.passes, name, "PASS") for name in settings}
    requested = [name.replace("_", "-") for name in names]  # duplicates stay, so that check_passes can refuse them by name
    return tuple(classes[name](**checked(classes[name], settings[name], where=f"pass {name}")) for name in requested)


def parse_override(text: str) -> tuple[str, Any]:
    """Key and value of `key=value`; the value is read as TOML, and as a string if it is not valid TOML.

    Raises:
        InputError: There is no `=` or no key.
    """
    key, equals, value = text.partition("=")
    key = key.strip().replace("-", "_")
    if not equals or not key:
        raise InputError(f"--set {text!r}: expected key=value, for example --set steps=600.")
    try:
        return key, tomllib.loads(f"value = {value.strip()}")["value"]
    except tomllib.TOMLDecodeError:
        return key, value.strip()


def read_toml(path: Path) -> dict[str, Any]:
    """Settings of a TOML file; ArtifactError if it is missing or malformed."""
    try:
        return tomllib.loads(path.read_text())
    except FileNotFoundError as err:
        raise ArtifactError(f"{path} does not exist; expected a TOML file of settings. Check the path.") from err
    except (OSError, ValueError) as err:
        raise ArtifactError(f"{path} cannot be read as TOML ({err}). Correct that line.") from err


def preset_path(name: str) -> Path:
    """The file of a shipped preset; otherwise UnsupportedError, which lists the shipped ones."""
    import calibration

    folder = Path(calibration.__path__[0]) / PRESETS
    known = sorted(path.stem for path in folder.glob("*.toml"))
    if name not in known:
        raise UnsupportedError(f"No preset {name!r}.{registry.suggestion(name, known)} Known: {', '.join(known) or 'none'}.")
    return folder / f"{name}.toml"


def checked(recipe_class: type[Any], settings: Mapping[str, Any], *, where: str, option: bool = False) -> dict[str, Any]:
    """`settings` converted to the types of the fields of `recipe_class`.

    Args:
        recipe_class: A dataclass.
        settings: Values by key.
        where: Where they were written, for the message.
        option: Whether each setting has a command-line option, so that the message names the option.

    Raises:
        InputError: An unknown key or a wrong type.
    """
    hints = typing.get_type_hints(recipe_class)
    known = [entry.name for entry in dataclasses.fields(recipe_class) if entry.init]
    for key, value in settings.items():
        if key not in known:
            name = "--" + key.replace("_", "-") if option else repr(key)
            raise InputError(f"{where} has no setting {name}.{registry.suggestion(key, known)} Known: {', '.join(known)}.")
        if not fits(value, hints[key]):
            raise InputError(f"{where}: {key} is {value!r} ({type(value).__name__}), expected {type_words(hints[key])}.")
    return {key: _converted(value, hints[key]) for key, value in settings.items()}


def fits(value: Any, hint: Any) -> bool:
    """Whether a TOML value has a field's type. An int is accepted as a float; a bool only as a bool."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return True
    if origin is typing.Literal:
        return value in arguments
    if origin in (typing.Union, types.UnionType):
        return any(fits(value, argument) for argument in arguments)
    if origin in (tuple, list, Sequence) or hint in (tuple, list):
        inner = arguments[0] if arguments else Any
        return isinstance(value, list | tuple) and all(fits(entry, inner) for entry in value)
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if hint is type(None) or hint is None:
        return value is None
    return isinstance(value, origin or hint)


def type_words(hint: Any) -> str:
    """A type for an error message: `a number`, `one of 'a', 'b'`."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Literal:
        return "one of " + ", ".join(repr(argument) for argument in arguments)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(type_words(argument) for argument in arguments if argument is not type(None))
    simple = {int: "a whole number", float: "a number", bool: "true or false", str: "a string"}
    return simple.get(hint, "a list" if origin in (tuple, list, Sequence) else str(hint))


def _converted(value: Any, hint: Any) -> Any:
    if hint is float:
        return float(value)
    return tuple(value) if isinstance(value, list) and typing.get_origin(hint) is tuple else value
