"""ParameterSpace: the one place that orders, flattens, unflattens and splits parameters."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from math import prod

import torch
from torch import Tensor, nn

from hessops.copies import Copyable
from hessops.errors import (
    ArgumentTypeError,
    DeviceError,
    DtypeError,
    ModelError,
    NonFiniteError,
    ParameterNameError,
    ShapeError,
)
from hessops.printed import Node, Printed, counted, short_dtype

RestrictTo = Mapping[str, nn.Parameter] | Iterable[str]


@dataclass(frozen=True, repr=False)
class ParameterSpace(Copyable, Printed):
    r"""The vector space R^P of a model's parameters, as an ordered set of named blocks.

    A vector of the space is either flat, a tensor of shape ``(P,)``, or a dictionary
    ``{name: tensor}``; a stack of k vectors is ``(k, P)``, or the dictionary with a leading
    dimension k on every entry. The flat order is that of the trainable entries of
    ``model.named_parameters()``; the order of the keys of a dictionary means nothing. A tied
    parameter appears once, under its first name; its other names are accepted wherever a name is.

    Attributes:
        names: Names of the parameters in flat order.
        parameter_shapes: Their shapes.
        dtype: The common dtype, a real floating-point one.
        device: The common device.
        aliases: Pairs (other name, name) of tied parameters.

    Example:
        >>> import torch
        >>> from hessops import ParameterSpace
        >>> space = ParameterSpace.from_model(torch.nn.Linear(2, 1))
        >>> space.names, space.size
        (('weight', 'bias'), 3)
        >>> vector = space.flatten({"bias": torch.ones(1), "weight": torch.zeros(1, 2)})
        >>> vector
        tensor([0., 0., 1.])
        >>> space.unflatten(vector)["bias"]
        tensor([1.])
    """

    names: tuple[str, ...]
    parameter_shapes: tuple[torch.Size, ...]
    dtype: torch.dtype
    device: torch.device
    aliases: tuple[tuple[str, str], ...] = field(default=(), compare=False)

    @classmethod
    def from_model(cls, model: nn.Module, restrict_to: RestrictTo | None = None) -> ParameterSpace:
        """The space of a model's trainable parameters, or of some of them.

        Args:
            model: Any module.
            restrict_to: A dictionary ``{name: parameter}`` of the model's own parameters, or just
                their names; ``None`` takes all trainable ones. The order is the model's either way.

        Raises:
            ModelError: The model has no trainable parameter, or a lazy one.
            ParameterNameError: `restrict_to` is empty or names an unknown or frozen parameter, or
                a tensor that is not the model's own.
            DtypeError: Parameters of several dtypes, or of one that is not real floating point.
            DeviceError: Parameters on several devices.
        """
        if not isinstance(model, nn.Module):
            raise ArgumentTypeError(f"model must be a torch.nn.Module, got {_type_name(model)}")
        every_name = dict(model.named_parameters(remove_duplicate=False))
        first_names = {id(p): name for name, p in model.named_parameters()}
        aliases = tuple(
            (name, first_names[id(p)])
            for name, p in every_name.items()
            if first_names[id(p)] != name
        )
        lazy = [name for name, p in every_name.items() if nn.parameter.is_lazy(p)]
        if lazy:
            raise ModelError(
                f"model has uninitialised lazy parameters {lazy}: run one forward pass first"
            )
        trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
        if not trainable:
            raise ModelError(
                f"model ({type(model).__name__}) has no trainable parameter (requires_grad=True on "
                "none)"
            )
        if restrict_to is not None:
            chosen = _chosen_names(restrict_to, every_name, dict(aliases))
            trainable = {name: p for name, p in trainable.items() if name in chosen}
        _refuse_several_devices({**every_name, **dict(model.named_buffers())})
        return cls.from_tensors(trainable, aliases=aliases)

    @classmethod
    def from_tensors(
        cls, tensors: Mapping[str, Tensor], *, aliases: Iterable[tuple[str, str]] = ()
    ) -> ParameterSpace:
        """The space of a dictionary of tensors, in the order of its keys.

        Raises:
            ParameterNameError: The dictionary is empty.
            DtypeError: Several dtypes, or one that is not real floating point.
            DeviceError: Several devices.
        """
        if not tensors:
            raise ParameterNameError("tensors is empty: a parameter space needs an entry")
        dtypes = {name: t.dtype for name, t in tensors.items()}
        if len(set(dtypes.values())) > 1:
            raise DtypeError(
                f"parameters have several dtypes {_summary(dtypes)}: convert the model to one"
            )
        dtype = next(iter(dtypes.values()))
        if not dtype.is_floating_point:
            raise DtypeError(f"parameters are {dtype}; a real floating-point dtype is needed")
        _refuse_several_devices(tensors)
        return cls(
            names=tuple(tensors),
            parameter_shapes=tuple(t.shape for t in tensors.values()),
            dtype=dtype,
            device=next(iter(tensors.values())).device,
            aliases=tuple((a, name) for a, name in aliases if name in tensors),
        )

    # --- sizes ---------------------------------------------------------------------------

    @cached_property
    def shapes(self) -> dict[str, torch.Size]:
        """Name -> shape, in flat order."""
        return dict(zip(self.names, self.parameter_shapes, strict=True))

    @cached_property
    def slices(self) -> dict[str, slice]:
        """Name -> the slice of the flat vector that holds the parameter."""
        slices, start = {}, 0
        for name, shape in self.shapes.items():
            slices[name] = slice(start, start + prod(shape))
            start += prod(shape)
        return slices

    @cached_property
    def size(self) -> int:
        """P, the number of scalars."""
        return sum(prod(shape) for shape in self.parameter_shapes)

    @cached_property
    def _canonical(self) -> dict[str, str]:
        return {**dict(self.aliases), **{name: name for name in self.names}}

    def resolve(self, name: str) -> str:
        """The name under which the parameter appears in the space, from any of its names.

        Raises:
            ParameterNameError: The space has no such parameter.
        """
        try:
            return self._canonical[name]
        except (KeyError, TypeError):
            raise ParameterNameError(
                f"unknown parameter {name!r}; the names are {_summary(self.names)}"
            ) from None

    # --- vectors and dictionaries --------------------------------------------------------

    def flatten(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """A dictionary of vectors, or of stacks of them, as a ``(P,)`` or ``(k, P)`` tensor.

        Entries have the parameter's shape, or one leading dimension k more. They are moved to the
        device of the space.

        Raises:
            ParameterNameError: A missing, unknown or doubly named entry; the message names it.
            ShapeError: An entry of a shape that does not fit, or leading dimensions that disagree.
            DtypeError: An entry of another dtype.
        """
        entries = self._entries(tensors)
        lead: tuple[int, ...] | None = None
        parts = []
        for name, shape in self.shapes.items():
            tensor = entries[name]
            if tensor.dtype != self.dtype:
                raise DtypeError(f"entry {name!r} is {tensor.dtype}, expected {self.dtype}")
            extra = tensor.ndim - len(shape)
            fits = extra in (0, 1) and tensor.shape[extra:] == shape
            if not fits:
                raise ShapeError(
                    f"entry {name!r} has shape {tuple(tensor.shape)}, expected {tuple(shape)} "
                    f"or (k, {', '.join(map(str, shape))}) for a stack"
                )
            this_lead = tuple(tensor.shape[:extra])
            if lead is not None and lead != this_lead:
                raise ShapeError(
                    f"entry {name!r} has leading dimensions {this_lead}, earlier entries {lead}"
                )
            lead = this_lead
            parts.append(tensor.to(self.device).reshape(*this_lead, prod(shape)))
        return torch.cat(parts, dim=-1)

    def _entries(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        if not isinstance(tensors, Mapping):
            raise ArgumentTypeError(
                f"expected a dictionary of tensors by parameter name, got {_type_name(tensors)}"
            )
        entries: dict[str, Tensor] = {}
        for key, tensor in tensors.items():
            name = self.resolve(key)
            if name in entries:
                raise ParameterNameError(
                    f"{key!r} is another name of {name!r}, which is given too: pass one of them"
                )
            if not isinstance(tensor, Tensor):
                raise ArgumentTypeError(f"entry {key!r} must be a tensor, got {_type_name(tensor)}")
            entries[name] = tensor
        missing = [name for name in self.names if name not in entries]
        if missing:
            raise ParameterNameError(f"missing entries {_summary(missing)}")
        return entries

    def unflatten(self, vector: Tensor) -> dict[str, Tensor]:
        """A ``(P,)`` or ``(k, P)`` tensor as a dictionary ``{name: (*shape) or (k, *shape)}``.

        The entries are views of `vector`.

        Raises:
            ShapeError: Any other shape.
        """
        if not isinstance(vector, Tensor):
            raise ArgumentTypeError(f"vector must be a torch.Tensor, got {_type_name(vector)}")
        if vector.ndim not in (1, 2) or vector.shape[-1] != self.size:
            raise ShapeError(
                f"vector has shape {tuple(vector.shape)}, expected ({self.size},) "
                f"or (k, {self.size})"
            )
        lead = vector.shape[:-1]
        return {
            name: vector[..., self.slices[name]].reshape(lead + shape)
            for name, shape in self.shapes.items()
        }

    # --- subspaces -----------------------------------------------------------------------

    def subspace(self, names: Iterable[str]) -> ParameterSpace:
        """The space of some of the parameters, in the order of this space.

        Raises:
            ParameterNameError: An unknown name, one parameter named twice, or no name at all.
        """
        chosen = self._resolved_once(names)
        kept = {name: shape for name, shape in self.shapes.items() if name in chosen}
        return replace(
            self,
            names=tuple(kept),
            parameter_shapes=tuple(kept.values()),
            aliases=tuple((a, name) for a, name in self.aliases if name in chosen),
        )

    def split(self, blocks: Mapping[str, Sequence[str]]) -> dict[str, ParameterSpace]:
        """Named subspaces that do not overlap.

        Args:
            blocks: Block name -> names of its parameters.

        Raises:
            ParameterNameError: An unknown name, an empty block, or a parameter in two blocks.
        """
        owner: dict[str, str] = {}
        spaces = {}
        for block, names in blocks.items():
            spaces[block] = self.subspace(names)
            for name in spaces[block].names:
                if name in owner:
                    raise ParameterNameError(
                        f"parameter {name!r} is in the blocks {owner[name]!r} and {block!r}"
                    )
                owner[name] = block
        return spaces

    def partition(self, blocks: Mapping[str, Sequence[str]]) -> dict[str, ParameterSpace]:
        """As `split`, with every parameter in a block.

        Raises:
            ParameterNameError: As of `split`, and for parameters that belong to no block.
        """
        pieces = self.split(blocks)
        covered = {name for piece in pieces.values() for name in piece.names}
        left_out = [name for name in self.names if name not in covered]
        if left_out:
            raise ParameterNameError(f"the parameters {left_out} belong to no block")
        return pieces

    def indices(self, names: Iterable[str]) -> Tensor:
        """Positions of some parameters in the flat vector, ``(p,)`` int64, in flat order."""
        chosen = self._resolved_once(names)
        return torch.cat(
            [
                torch.arange(where.start, where.stop, device=self.device)
                for name, where in self.slices.items()
                if name in chosen
            ]
        )

    def _resolved_once(self, names: Iterable[str]) -> set[str]:
        if isinstance(names, str):
            raise ArgumentTypeError(
                f"names must be a collection of names, got the string {names!r}"
            )
        chosen: set[str] = set()
        for name in names:
            canonical = self.resolve(name)
            if canonical in chosen:
                raise ParameterNameError(f"parameter {name!r} is named twice")
            chosen.add(canonical)
        if not chosen:
            raise ParameterNameError("names is empty: name at least one parameter")
        return chosen

    def to(self, device: torch.device | str) -> ParameterSpace:
        """The same space on another device."""
        return replace(self, device=torch.device(device))

    def _node(self) -> Node:
        # One line: error messages name spaces.
        return Node(
            f"ParameterSpace({counted(len(self.names), 'parameter')}, size {self.size}, "
            f"{short_dtype(self.dtype)}, {self.device})",
            details=[f"{name} {tuple(shape)}" for name, shape in self.shapes.items()],
        )


def require_finite(
    tensors: Mapping[str, Tensor], what: str, *, allow_infinite: bool = False
) -> None:
    """Raises `NonFiniteError` naming the first entry that holds a NaN or an infinity."""
    refused = "NaN" if allow_infinite else "NaN or infinite"
    for name, tensor in tensors.items():
        if tensor.is_meta or not (tensor.is_floating_point() or tensor.is_complex()):
            continue
        bad = tensor.isnan().any() if allow_infinite else not tensor.isfinite().all()
        if bad:
            raise NonFiniteError(f"{what} {name!r} holds {refused} values")


def _chosen_names(
    restrict_to: RestrictTo, every_name: Mapping[str, Tensor], aliases: Mapping[str, str]
) -> set[str]:
    if isinstance(restrict_to, str) or not isinstance(restrict_to, Iterable):
        raise ArgumentTypeError(
            "restrict_to must be a dictionary of the model's parameters or a collection of their "
            f"names, got {restrict_to!r}"
        )
    chosen = set()
    for name in restrict_to:
        if not isinstance(name, str):
            raise ArgumentTypeError(
                "restrict_to must hold names of parameters (or map them to the parameters), got a "
                f"{_type_name(name)} among them"
            )
        if name not in every_name:
            raise ParameterNameError(
                f"restrict_to names the unknown parameter {name!r}; "
                f"the model has {_summary(tuple(every_name))}"
            )
        if not every_name[name].requires_grad:
            raise ParameterNameError(
                f"restrict_to names the frozen parameter {name!r} (requires_grad is False)"
            )
        if isinstance(restrict_to, Mapping) and restrict_to[name] is not every_name[name]:
            raise ParameterNameError(
                f"restrict_to[{name!r}] is not the model's own parameter of that name: operators "
                "are taken at the model's values; load other values into the model first"
            )
        chosen.add(aliases.get(name, name))
    if not chosen:
        raise ParameterNameError("restrict_to is empty: name at least one parameter, or pass None")
    return chosen


def _refuse_several_devices(tensors: Mapping[str, Tensor]) -> None:
    devices = {name: t.device for name, t in tensors.items()}
    if len(set(devices.values())) > 1:
        raise DeviceError(
            f"parameters and buffers are on several devices {_summary(devices)}: "
            "move the model to one"
        )


def _summary(items: Mapping[str, object] | Sequence[str], most: int = 8) -> str:
    entries = [f"{k}: {v}" for k, v in items.items()] if isinstance(items, Mapping) else list(items)
    more = f", ... ({len(entries)} in all)" if len(entries) > most else ""
    return "[" + ", ".join(entries[:most]) + more + "]"


def _type_name(value: object) -> str:
    return type(value).__name__
