"""Inputs that are the same tensors from call to call, adapter weights: one copy in memory of the session, which its recorded runs read."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from torch import Tensor


class KeptInputs:
    """Copies of some inputs, at addresses that stay. Calls are made under the session's lock.

    Args:
        names: Of the inputs.
    """

    def __init__(self, names: Collection[str]) -> None:
        self.names = frozenset(names)
        self._copies: dict[str, Tensor] = {}
        self._filled_from: dict[str, Tensor] = {}

    def renew(self, inputs: Mapping[str, Tensor]) -> None:
        """Copy those inputs that are other tensors than before. On a GPU asynchronous."""
        for name in self.names:
            if self._filled_from.get(name) is inputs[name]:
                continue
            if name in self._copies:
                self._copies[name].copy_(inputs[name], non_blocking=True)
            else:
                self._copies[name] = inputs[name].clone()
            self._filled_from[name] = inputs[name]

    def get(self, name: str) -> Tensor | None:
        """The copy of an input since `renew`; None for an input that is not kept."""
        return self._copies.get(name)

    def clear(self) -> None:
        """Drop all copies."""
        self._copies.clear()
        self._filled_from.clear()
