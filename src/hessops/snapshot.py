"""ModelSnapshot: the private copy of a model and its loss that an operator works on."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, suppress
from dataclasses import replace
from types import BuiltinFunctionType, FunctionType, MethodType
from typing import ClassVar, TypeVar

import torch
from torch import Tensor, nn
from torch.func import functional_call

from hessops.copies import Copyable
from hessops.errors import DtypeError, LossError, ModelError
from hessops.hashing import hash_of_entries, mixed, plain_items, word_of_values
from hessops.isolation import isolated, twice_differentiable_kernels
from hessops.nested import rounded
from hessops.point_loss import Loss
from hessops.space import ParameterSpace, RestrictTo, require_finite

_Module = TypeVar("_Module", bound=nn.Module)


class ModelSnapshot(Copyable):
    """A copy of a model, and of a loss that is a module, as they were at one time.

    It never changes: `refreshed` and `to` return another. The user's model is never written to,
    moved or switched.

    Args:
        model: Called with one argument.
        loss: A module or another object, which is copied, or a function, which is kept.
        restrict_to: The parameters to differentiate by; ``None`` takes all trainable ones.

    Attributes:
        space: The parameters to differentiate by.
        module: The copy of the model, for its structure; use `params` for values.
        loss: The copy of the loss.
        users_model: The original.
        users_loss: The original.
        params: The values of the parameters of `space`, ``{name: tensor}``, without gradients.
        frozen: Those of all others.
        buffers: Those of the buffers.

    Raises:
        ModelError: No trainable parameter; a model that rewrites its weights
            (``Embedding(max_norm=...)``), has sparse gradients, is compiled, or cannot be copied.
        LossError: `loss` holds parameters of the model.
        ParameterNameError: `restrict_to` names an unknown or frozen parameter.
        DtypeError: Parameters of mixed or complex dtype.
        DeviceError: Parameters on several devices.
        NonFiniteError: NaN or infinity in a parameter or buffer.

    Example:
        >>> import torch
        >>> from hessops.snapshot import ModelSnapshot
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> snapshot = ModelSnapshot(model, torch.nn.MSELoss())
        >>> _ = torch.nn.init.zeros_(model.weight)
        >>> bool(snapshot.params["weight"].any())
        True
        >>> bool(snapshot.refreshed().params["weight"].any())
        False
    """

    _names_of_parts: ClassVar[Mapping[str, str]] = {
        "module": "model",
        "users_model": "model",
        "users_loss": "loss",
    }

    space: ParameterSpace
    module: nn.Module
    loss: Loss
    users_model: nn.Module
    users_loss: Loss
    params: Mapping[str, Tensor]
    frozen: Mapping[str, Tensor]
    buffers: Mapping[str, Tensor]

    def __init__(self, model: nn.Module, loss: Loss, restrict_to: RestrictTo | None = None) -> None:
        self.space = ParameterSpace.from_model(model, restrict_to)
        _refuse_unsuitable(model)
        _refuse_shared_parameters(model, loss)
        self.users_model = model
        self.users_loss = loss
        self._take()

    def _take(self) -> None:
        model, loss = self.users_model, self.users_loss
        _require_unchanged_parameters(model, self.space)
        # Inside inference_mode the copies would be inference tensors, which have no gradient.
        with isolated(self.space.device):
            require_finite(dict(model.named_parameters()), "parameter")
            # Attention masks are -inf where nothing may be seen.
            require_finite(dict(model.named_buffers()), "buffer", allow_infinite=True)
            module = _copied(model, "model").to(self.space.device)
            if isinstance(loss, nn.Module):
                loss = _copied(loss, "loss").to(self.space.device).requires_grad_(False)
            elif not isinstance(loss, (FunctionType, BuiltinFunctionType, MethodType, type)):
                with suppress(Exception):  # kept as it is where it cannot be copied
                    loss = copy.deepcopy(loss)
        self._hold(module, loss)

    def _hold(self, module: nn.Module, loss: Loss) -> None:
        """Names the tensors of a copy: where to differentiate, and what stays."""
        self.module, self.loss = module, loss
        every = {name: p.detach() for name, p in module.named_parameters()}
        self.params = {name: every[name] for name in self.space.names}
        self.frozen = {name: p for name, p in every.items() if name not in self.params}
        self.buffers = {name: b.detach() for name, b in module.named_buffers()}
        self._tied = _other_places(module)
        self._hash: int | None = None
        self._has_rnn = any(isinstance(m, nn.RNNBase) for m in module.modules())
        # The parametrization's class is private to torch.
        self._has_weight_norm = any(type(m).__name__ == "_WeightNorm" for m in module.modules())

    def refreshed(self) -> ModelSnapshot:
        """A copy of the user's model and loss as they are now.

        Raises:
            ModelError: A parameter was removed or reshaped, or the model cannot be copied.
            DtypeError: A parameter has another dtype than before.
            NonFiniteError: NaN or infinity in a parameter or buffer.
        """
        fresh = copy.copy(self)
        fresh._take()
        return fresh

    def restricted(self, names: Iterable[str]) -> ModelSnapshot:
        """The same copy, differentiated by some of its parameters only; values are shared.

        Raises:
            ParameterNameError: A name that is not in `space`, or none.
        """
        fewer = copy.copy(self)
        fewer.space = self.space.subspace(names)
        fewer._hold(self.module, self.loss)
        return fewer

    def at(self, params: Mapping[str, Tensor]) -> ModelSnapshot:
        """The same snapshot with other values of the parameters of `space`, not copied."""
        other = copy.copy(self)
        other.params = dict(params)
        other._hash = None
        return other

    def to(self, device: torch.device | str) -> ModelSnapshot:
        """The same snapshot, values included, on another device."""
        moved = copy.copy(self)
        moved.space = self.space.to(device)
        loss = self.loss
        if isinstance(loss, nn.Module):
            loss = copy.deepcopy(loss).to(device)
        moved._hold(copy.deepcopy(self.module).to(device), loss)
        return moved

    def in_precision(self, dtype: torch.dtype) -> ModelSnapshot:
        """The same snapshot with its values rounded: parameters, buffers, and those of the loss.

        Of the tensors, those that are real floating point and wider than `dtype` are; a constant
        that the model holds as a plain attribute stays. It cannot be `refreshed`.

        Args:
            dtype: A lower one than that of the parameters.

        Raises:
            NonFiniteError: A parameter or buffer is beyond the range of `dtype`.

        Example:
            >>> import torch
            >>> from hessops.snapshot import ModelSnapshot
            >>> snapshot = ModelSnapshot(torch.nn.Linear(2, 1).double(), torch.nn.MSELoss())
            >>> lower = snapshot.in_precision(torch.float32)
            >>> lower.params["weight"].dtype, snapshot.params["weight"].dtype
            (torch.float32, torch.float64)
        """
        lower = copy.copy(self)
        lower.space = replace(self.space, dtype=dtype)
        with isolated(self.space.device):
            loss = copy.deepcopy(self.loss) if isinstance(self.loss, nn.Module) else self.loss
            module = copy.deepcopy(self.module)
            _round(module, dtype)
            if isinstance(loss, nn.Module):
                _round(loss, dtype)
            require_finite(dict(module.named_parameters()), f"in {dtype}, parameter")
        lower._hold(module, loss)
        return lower

    def hash_of_values(self) -> int:
        """A 64-bit hash of all values, those of the loss too, computed once.

        On the meta device, where there are none, it is that of their names.
        """
        if self._hash is None:
            loss = _tensors_of_loss(self.loss)
            tensors = {**self.params, **self.frozen, **_without_counters(self.buffers), **loss}
            total = word_of_values([*tensors, *_plain_parts(self.loss)])
            for tensor in () if self.space.device.type == "meta" else tensors.values():
                total = int(mixed(hash_of_entries(tensor) + total))
            self._hash = total
        return self._hash

    def kernels(self, *, any_order: bool = False) -> AbstractContextManager[None]:
        """A context in which every kernel of the model can be differentiated twice.

        Args:
            any_order: Derivatives of third order and forward mode are right too, at some cost.
        """
        return twice_differentiable_kernels(
            without_cudnn=self._has_rnn and self.space.device.type == "cuda",
            with_explicit_weight_norm=self._has_weight_norm,
            with_explicit_layers=any_order,
        )

    def output(self, params: Mapping[str, Tensor], x: object) -> object:
        """The model's output at `params`, which may name some of the parameters only."""
        # Cloned, because a forward may write to its buffers (a counter, a running mean).
        buffers = {name: buffer.clone() for name, buffer in self.buffers.items()}
        return self.call({**buffers, **self.frozen, **self.params, **params}, x)

    def call(self, tensors: Mapping[str, Tensor], x: object) -> object:
        """The model's output where these tensors stand in for its parameters and buffers.

        The forward may write to them.
        """
        tied = {other: tensors[name] for other, name in self._tied.items() if name in tensors}
        return functional_call(self.module, {**tensors, **tied}, (x,), tie_weights=False)


def _other_places(module: nn.Module) -> dict[str, str]:
    """Where else in a module a tied tensor is, and under which name it was before.

    A module that has several names holds its tensors in one place. With ``tie_weights=True``,
    `torch.func.functional_call` would replace them there once for each name, and not find the way
    back: the module would be left without parameters.
    """
    first: dict[int, str] = {}
    others = {}
    for prefix, part in module.named_modules():
        for key, tensor in (*part._parameters.items(), *part._buffers.items()):
            name = f"{prefix}.{key}" if prefix else key
            if tensor is not None and first.setdefault(id(tensor), name) != name:
                others[name] = first[id(tensor)]
    return others


def _round(module: nn.Module, dtype: torch.dtype) -> None:
    """Rounds the parameters and buffers of a module in place; complex ones stay.

    `nn.Module.to` would take the real part of a complex buffer, and widen narrow ones.
    """
    for tensor in (*module.parameters(), *module.buffers()):
        tensor.data = rounded(tensor.data, dtype)


def _without_counters(buffers: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Buffers without those that count batches and have no part in the output."""
    return {n: b for n, b in buffers.items() if not n.endswith("num_batches_tracked")}


def _tensors_of_loss(loss: Loss) -> dict[str, Tensor]:
    if not isinstance(loss, nn.Module):
        return {}
    named = [*loss.named_parameters(prefix="loss"), *loss.named_buffers(prefix="loss")]
    return {name: tensor.detach() for name, tensor in named}


def _plain_parts(loss: Loss) -> list[object]:
    """The name of a loss, and the numbers and words that it holds."""
    name = getattr(loss, "__qualname__", type(loss).__qualname__)
    modules = loss.modules() if isinstance(loss, nn.Module) else [loss]
    return [name, *(plain_items(getattr(part, "__dict__", {})) for part in modules)]


def _require_unchanged_parameters(model: nn.Module, space: ParameterSpace) -> None:
    """Refuses a model whose parameters no longer are those of a space."""
    current = dict(model.named_parameters())
    for name, shape in space.shapes.items():
        if name not in current or current[name].shape != shape:
            raise ModelError(f"parameter {name!r} of the model was removed or reshaped")
        if current[name].dtype != space.dtype:
            raise DtypeError(
                f"parameter {name!r} of the model is {current[name].dtype} now and was "
                f"{space.dtype}; make a new operator"
            )


def _refuse_unsuitable(model: nn.Module) -> None:
    if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        raise ModelError(f"model is a {type(model).__name__}; pass the module inside, model.module")
    _refuse_sharded(model)
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule) or hasattr(module, "_orig_mod"):
            part = f" in its module {name!r}" if name else ""
            raise ModelError(
                f"model is compiled{part} ({type(module).__name__}) and cannot be differentiated "
                "twice; use the original module (_orig_mod of a torch.compile result)"
            )
        if not isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
            continue
        if module.max_norm is not None:
            raise ModelError(
                f"module {name!r} ({type(module).__name__}) has max_norm={module.max_norm}, which "
                "rewrites the weights in the forward; renormalise once and set max_norm=None"
            )
        if module.sparse:
            raise ModelError(
                f"module {name!r} ({type(module).__name__}) has sparse gradients, which cannot be "
                "differentiated again; set sparse=False"
            )
        if module.scale_grad_by_freq:
            raise ModelError(
                f"module {name!r} ({type(module).__name__}) has scale_grad_by_freq=True, so that "
                "its gradients are not those of the loss; set it to False"
            )


def _refuse_sharded(model: nn.Module) -> None:
    """Refuses a model of whose parameters this process holds a part only."""
    wrappers = [
        type(module).__name__
        for module in model.modules()
        if any(base.__name__ == "FullyShardedDataParallel" for base in type(module).__mro__)
    ]
    # By name: importing what makes them takes longer than importing all of this.
    sharded = [name for name, p in model.named_parameters() if type(p).__name__ == "DTensor"]
    if wrappers or sharded:
        found = f"parameter {sharded[0]!r} is a DTensor" if sharded else f"it is in {wrappers[0]}"
        raise ModelError(
            f"model is sharded over processes ({found}): an operator needs whole parameters in "
            "each process. Load them into a plain module, by "
            "torch.distributed.checkpoint.state_dict.get_model_state_dict(model, options="
            "StateDictOptions(full_state_dict=True)), and shard the data instead "
            "(DistributedAveraging)"
        )


def _refuse_shared_parameters(model: nn.Module, loss: Loss) -> None:
    if not isinstance(loss, nn.Module):
        return
    of_model = {id(p): name for name, p in model.named_parameters()}
    shared = [of_model[id(p)] for p in loss.parameters() if id(p) in of_model]
    if shared:
        raise LossError(
            f"loss holds parameters of the model {shared[:8]}, by which it would not be "
            "differentiated: a loss is a function of output and target; add a quadratic penalty "
            "c/2·|θ|² as operator.shift(c), or let the model return what the loss needs"
        )


def _copied(module: _Module, argument: str) -> _Module:
    try:
        return copy.deepcopy(module)
    except Exception as error:
        raise ModelError(
            f"{argument} ({type(module).__name__}) cannot be copied ({error}); operators work on "
            "their own copy. Remove attributes that hold tensors with a graph, or pass the plain "
            "module inside a wrapper (model.module of a DistributedDataParallel)"
        ) from error
