"""Model families, one in each file."""

from edm_deploy import models, registry
from edm_deploy.errors import UnsupportedError
from edm_deploy.network.family import Family


def family_named(name: str) -> Family:
    """The family in `models/<name>.py`.

    Raises:
        UnsupportedError: There is none of this name; the message lists those that exist.
    """
    family: Family = registry.load(models, name, "FAMILY")
    return family


def name_of_family(class_name: str) -> str:
    """The name of the family of a diffusers class.

    Raises:
        UnsupportedError: It has no family; the message names the nearest class and how to add a family.
    """
    classes = {family_named(name).class_name: name for name in registry.names(models)}
    if class_name not in classes:
        raise UnsupportedError(
            f"No model family supports {class_name!r}.{registry.suggestion(class_name, classes)} "
            f"Known: {', '.join(sorted(classes))}. To add one, write edm_deploy/models/<name>.py (CONTRIBUTING.md)."
        )
    return classes[class_name]
