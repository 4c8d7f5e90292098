"""What methods with trained weights share: whose weights they are, on which device, and whether they changed."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass
from functools import cached_property
from os import PathLike, fspath
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from visionselector_eval.baselines.contract.base import Compressor, Host, weights_digest
from visionselector_eval.baselines.contract.errors import InputError


@dataclass(frozen=True)
class Weights:
    """How the trained module of a method is called, read and recognised.

    Args:
        option: the method's option that takes it, which is also its name in messages.
        kind: its class; instances have `width`, the size of the features or states that they read.
        load: reads one from a folder, a file or the hub.
        of_checkpoint: (tensors, id) -> the one among a checkpoint's tensors, or None where there is none.
        names: what its tensors are called in a checkpoint.
    """

    option: str
    kind: type[nn.Module]
    load: Callable[[str], nn.Module]
    of_checkpoint: Callable[[Mapping[str, Tensor], str], nn.Module | None]
    names: str


@dataclass(frozen=True, kw_only=True)
class LearnedCompressor(Compressor):
    """A method that reads a trained module: the one given as an option, else the one in the backbone's checkpoint.

    A subclass states `weights` and has a field of that name; `module_on(device)` is the module.
    """

    trained = True
    weights: ClassVar[Weights]

    def __post_init__(self) -> None:
        option, given = self.weights.option, self._given
        if isinstance(given, PathLike):
            object.__setattr__(self, option, fspath(given))
        elif not (given is None or isinstance(given, self.weights.kind) or (isinstance(given, str) and given)):
            raise InputError(
                f"invalid option {option}={given!r} of method '{self.name}': expected a folder, "
                f"a .safetensors or .bin file, or a hub id (in Python also a {self.weights.kind.__name__})"
            )

    def bind(self, host: Host) -> Self:
        """A copy that holds its module, checked against the backbone.

        Raises:
            InputError: no weights given nor in the backbone's checkpoint, some of another width, or some that cannot be
                read; what the stage of the method refuses.
        """
        super().bind(host)
        option = self.weights.option
        if self._given is not None:
            source, module = self._given if isinstance(self._given, str) else "given as a module", self._module
        else:
            source = f"of checkpoint {host.id}"
            module = self.weights.of_checkpoint(host.extra_weights, host.id)
            if module is None:
                raise InputError(
                    f"{self.name} needs {option} weights: checkpoint {host.id} has no {self.weights.names}*; "
                    f"give {option}=FOLDER_OR_ID"
                )
        if module.width != host.width:
            raise InputError(
                f"{option} {source} has width {module.width} but backbone {host.id} has {host.width}: "
                "give one trained for it"
            )
        bound = dataclasses.replace(self)
        vars(bound)["_module"] = module  # seeds the cached property; no field, since it is no option
        return bound

    def fingerprint(self) -> str:
        """sha256 of given weights by value (see `weights_digest`).

        Empty where the weights come from the backbone, whose id and revision tell them already.
        """
        return "" if self._given is None else weights_digest(self._module)

    def module_on(self, device: torch.device) -> nn.Module:
        """The module on `device`, copied there once, and again after its weights have changed."""
        module: nn.Module = self._module
        parameters = list(module.parameters())
        if parameters[0].device == device:
            return module
        # Weights made in inference mode count no versions and are not trained either.
        versions = tuple(0 if p.is_inference() else p._version for p in parameters)
        if device not in self._copies or self._copies[device][0] != versions:
            self._copies[device] = versions, deepcopy(module).to(device)
        return self._copies[device][1]

    @property
    def _given(self) -> Any:
        return getattr(self, self.weights.option)

    @cached_property
    def _module(self) -> Any:
        """The module, read at its first use (`bind` puts it here for a bound method)."""
        option, given = self.weights.option, self._given
        if given is None:
            raise InputError(
                f"{self.name} needs {option} weights: give {option}=FOLDER_OR_ID, or bind it to a backbone "
                f"whose checkpoint has {self.weights.names}*"
            )
        return self.weights.load(given) if isinstance(given, str) else given

    @cached_property
    def _copies(self) -> dict[torch.device, tuple[tuple[int, ...], nn.Module]]:
        return {}
