"""Model families, one a file. The only folder below `tools/` that may import diffusers."""

from edm_deploy import models, registry
from edm_deploy.errors import UnsupportedError
from edm_deploy.network.family import Family


def family_named(name: str) -> Family:
    """The family in `models/<name>.py`; UnsupportedError lists the known ones otherwise."""
    family: Family = registry.load(models, name, "FAMILY")
    return family


def name_of_family(class_name: str) -> str:
    """The name of the family that answers for a diffusers class.

    Raises:
        UnsupportedError: No family does; the message names the nearest and how to add one.
    """
    classes = {family_named(name).class_name: name for name in registry.names(models)}
    if class_name not in classes:
        raise UnsupportedError(
            f"No model family answers for {class_name!r}.{registry.suggestion(class_name, classes)} "
            f"Known: {', '.join(sorted(classes))}. To add one, write edm_deploy/models/<name>.py (CONTRIBUTING.md)."
        )
    return classes[class_name]
