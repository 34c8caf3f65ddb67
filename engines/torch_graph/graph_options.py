"""How an engine's graph runs apart from its layers: what `build-engine` records, and what an engine of an earlier version means."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from edm_deploy.runtime.backend import BuildOptions


@dataclass(frozen=True, kw_only=True)
class GraphOptions:
    """Options of a graph. The defaults hold until a GPU has shown a gain; they are also what engines without an entry were built with.

    Attributes:
        rest: `inductor` compiles what is between the layers by torch.compile, `eager` runs it as it is.
        attention: `int8` computes the products of queries and keys in INT8, `float` as the model does.
    """

    rest: str = "eager"
    attention: str = "float"

    @classmethod
    def requested(cls, options: BuildOptions) -> GraphOptions:
        """The options of a build."""
        return cls(**{name: value for name in NAMES if (value := getattr(options, name)) is not None})

    @classmethod
    def recorded(cls, options: Mapping[str, Any]) -> GraphOptions:
        """The options of an engine, from `build.options` of its manifest."""
        return cls(**{name: str(options[name]) for name in NAMES if name in options})

    def to_json(self) -> dict[str, str]:
        """For `build.options` of a manifest."""
        return asdict(self)


NAMES = tuple(GraphOptions.__dataclass_fields__)
