"""What goes into and comes out of some modules while a model runs on a batch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from hessops.errors import ModelError
from hessops.functional.products import Params, StackedGradient, differentiable
from hessops.nested import differentiable_leaves
from hessops.objective import Objective
from hessops.streaming import Batch


@dataclass(frozen=True)
class Call:
    """One call of a module.

    Attributes:
        input: The tensor it was called with.
        output: The tensor it returned, with the graph that leads on to the model's output.
    """

    input: Tensor
    output: Tensor


@dataclass
class _Recorder:
    """Keeps the calls of some modules; of a module with other arguments, only that there were."""

    copies: bool
    calls: dict[str, list[Call | None]] = field(default_factory=dict)
    versions: list[tuple[Tensor, int]] = field(default_factory=list)
    is_open: bool = True

    def hook_of(self, name: str) -> object:
        def record(
            module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object], output: object
        ) -> object:
            if not self.is_open:  # a checkpoint that recomputes what it did not keep
                return None
            given = [*args, *kwargs.values()]
            calls = self.calls.setdefault(name, [])
            if len(given) != 1 or not isinstance(given[0], Tensor):
                calls.append(None)
                return None
            if not isinstance(output, Tensor):
                calls.append(None)
                return None
            x = given[0].detach()
            calls.append(Call(x.clone() if self.copies else x, output))
            if self.copies:
                return output.clone()
            self.versions += [(x, x._version), (output, output._version)]
            return None

        return record

    @property
    def is_whole(self) -> bool:
        """Whether nothing that was kept was written to afterwards."""
        return all(tensor._version == version for tensor, version in self.versions)


class CapturedRun:
    r"""One run of a model, with the calls of some of its modules.

    Args:
        objective: Model and loss, at whose parameters it runs.
        batch: n points.
        modules: Name -> module of ``objective.model``.
        params: The parameters that record gradients; ``None`` takes those of the objective.

    Attributes:
        output: The model's output, with its graph.
        leaves: The parameters that it leads to.
        calls: Name -> calls, in their order; ``None`` for one that did not map a tensor to a
            tensor.

    Raises:
        ModelError: A module inside a checkpoint that hides its graph.

    Example:
        >>> import torch
        >>> from hessops import Batch, Objective
        >>> from hessops.functional.capture import CapturedRun
        >>> model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Tanh())
        >>> objective = Objective(model, torch.nn.MSELoss())
        >>> batch = Batch.from_raw((torch.zeros(4, 3), torch.ones(4, 2)))
        >>> run = CapturedRun(objective, batch, {"0": objective.model[0]})
        >>> run.gradients([torch.ones(1, 4, 2)])["0"][0].shape
        torch.Size([1, 4, 2])
    """

    def __init__(
        self,
        objective: Objective,
        batch: Batch,
        modules: Mapping[str, nn.Module],
        params: Params | None = None,
    ) -> None:
        self.leaves = differentiable(objective.params if params is None else params)
        recorder = _Recorder(copies=False)
        self.output = self._run(objective, batch, modules, recorder)
        if not recorder.is_whole:
            # An operation in place after a module: what it returned is something else by now.
            recorder = _Recorder(copies=True)
            self.output = self._run(objective, batch, modules, recorder)
        self.calls = recorder.calls
        for name, calls in self.calls.items():
            if any(call is not None and not call.output.requires_grad for call in calls):
                raise ModelError(
                    f"the output of module {name!r} has no graph (a checkpoint with "
                    "use_reentrant=True, or torch.no_grad inside the model?), so that its "
                    "gradients cannot be followed; use use_reentrant=False"
                )

    def _run(
        self,
        objective: Objective,
        batch: Batch,
        modules: Mapping[str, nn.Module],
        recorder: _Recorder,
    ) -> object:
        with _hooked(modules, recorder), torch.enable_grad():
            return objective.output(self.leaves, batch.x)

    @property
    def parts(self) -> list[Tensor]:
        """The floating-point tensors of the output."""
        return differentiable_leaves(self.output)

    def gradients(
        self, columns: Sequence[Tensor], stacked_gradient: StackedGradient | None = None
    ) -> dict[str, list[Tensor]]:
        """Gradients by the output of every call, ``(k, *output)``, for weights of the outputs.

        Args:
            columns: One tensor ``(k, *output)`` per output of the model.
            stacked_gradient: Reused between calls, it remembers whether vectorising works.
        """
        gradient_of = stacked_gradient or StackedGradient()
        known = [(name, c) for name, calls in self.calls.items() for c in calls if c is not None]
        if not known:
            return {}
        found = gradient_of(self.parts, [call.output for _, call in known], columns)
        by_name: dict[str, list[Tensor]] = {}
        for (name, _), gradient in zip(known, found, strict=True):
            by_name.setdefault(name, []).append(gradient)
        return by_name

    def parameter_gradients(self, weights: Sequence[Tensor]) -> dict[str, Tensor]:
        """Gradients by the parameters, ``{name: shape}``, for a weight ``(*output)`` per output."""
        found = StackedGradient()(
            self.parts, list(self.leaves.values()), [weight.unsqueeze(0) for weight in weights]
        )
        return {name: g[0] for name, g in zip(self.leaves, found, strict=True)}


@contextmanager
def _hooked(modules: Mapping[str, nn.Module], recorder: _Recorder) -> Iterator[None]:
    handles = []
    try:
        for name, module in modules.items():
            hook = recorder.hook_of(name)
            handles.append(module.register_forward_hook(hook, with_kwargs=True))  # type: ignore[arg-type]  # as torch calls it
        yield
    finally:
        recorder.is_open = False
        for handle in handles:
            handle.remove()
