"""LiSSA: the inverse as a Neumann series over the batches of the data."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Literal, Self

import torch
from torch import Tensor

from hessops.batch.averaging import Averaging
from hessops.batch.operation import BatchOperation
from hessops.errors import (
    ArgumentError,
    ConvergenceWarning,
    NonFiniteProductError,
    ShapeError,
    StructureError,
)
from hessops.functional.krylov import ritz_pairs
from hessops.functional.precision import finite_rows
from hessops.isolation import isolated
from hessops.operators.base import TensorOperator
from hessops.operators.curvature import POINT_AVERAGING, BatchOperator
from hessops.operators.inverse import InverseOperator
from hessops.operators.outcomes import CODE, Outcomes, Problem
from hessops.operators.solution import Solution, SolveStatus
from hessops.processes import ONE_PROCESS
from hessops.progress import Bar, progress_bar
from hessops.randomness import resolved_generator
from hessops.streaming import BatchStream, Unpack
from hessops.validation import (
    checked_count,
    checked_number,
    checked_rows,
    require_single_or_double,
)
from hessops.warn import warn

RowsProduct = Callable[[Tensor], Tensor]
Scale = float | Literal["auto"]
# The updates of a recursion that converges shrink; noise of sampled batches may enlarge them.
GROWTH_LIMIT = 10
# With eigenvalues of every (A_b + λI)/s + dI between 0 and 2, no step lengthens h by more than ‖b‖.
# An iterate longer than twice what that allows has certainly met another one, if A_b is symmetric;
# otherwise a recursion may grow for a while and converge after all.
DIVERGENCE_FACTOR = 2
DIVERGENCE_FACTOR_OF_OTHERS = 1e8
# Updates of a whole pass below half the tolerance are worth a look at the true residual; where that
# does not meet it, a tenth of it is.
QUIET_FACTOR, QUIETER_FACTOR = 0.5, 0.1
# Above the smallest scale that is stable, (a + λ) / (2 - d) for a the largest eigenvalue; and where
# steps differ, above twice that, so that no step overshoots and adds to the noise.
SCALE_MARGIN = 1.1
SCALE_MARGIN_OF_BATCHES = 2.2
# A smallest Ritz value below minus this share of the largest is negative curvature.
CURVATURE_SHARE = 1e-6
# Products by which the extreme eigenvalues of a batch, and of the whole data, are estimated.
LANCZOS_STEPS_OF_BATCH, LANCZOS_STEPS_OF_DATA = 10, 20


def lissa_update(
    current: Tensor, product: RowsProduct, rhs: Tensor, *, dampen: float, scale: float
) -> Tensor:
    r""":math:`b - d h - A h / s`, what a step adds to h.

    It is the residual :math:`b - (A + d s I) x` of :math:`x = h / s`.
    """
    update = product(current) / -scale
    update += rhs
    return update.sub_(current, alpha=dampen) if dampen else update


def lissa_recursion(
    products: Iterable[RowsProduct],
    rhs: Tensor,
    *,
    dampen: float,
    scale: float,
    start: Tensor | None = None,
) -> Tensor:
    r"""Runs :math:`h \leftarrow b + (1 - d) h - A_t h / s` and returns :math:`h / s`.

    (Agarwal, Bullins & Hazan 2017; Koh & Liang 2017.) With the same A in every step, and
    eigenvalues of A/s + dI between 0 and 2, it tends to :math:`(A + d s I)^{-1} b`.

    Args:
        products: One map of rows ``(k, n)`` per step.
        rhs: b, ``(k, n)``.
        dampen: d.
        scale: s.
        start: h at the beginning; ``None`` is b.

    Raises:
        NonFiniteProductError: The recursion diverged to infinity, or a product is NaN.

    Example:
        >>> import torch
        >>> from hessops.solvers.lissa import lissa_recursion
        >>> steps = [lambda rows: 2 * rows] * 60
        >>> lissa_recursion(steps, torch.ones(1, 1), dampen=0.0, scale=4.0)
        tensor([[0.5000]])
    """
    current = rhs if start is None else start
    first_update = last_update = None
    for product in products:
        update = lissa_update(current, product, rhs, dampen=dampen, scale=scale)
        current = current + update
        last_update = update.norm(dim=1)
        first_update = last_update if first_update is None else first_update
        if not last_update.isfinite().all():
            raise NonFiniteProductError(
                f"the recursion of LiSSA diverged: scaling ({scale:g}) must exceed half of the "
                "largest eigenvalue of every sampled batch, and negative curvature needs damping; "
                "raise one of them"
            )
    if first_update is not None and last_update is not None:
        _warn_of_growth(first_update, last_update, scale)
    return current / scale


def _warn_of_growth(first: Tensor, last: Tensor, scale: float) -> None:
    growing = last > GROWTH_LIMIT * first
    if growing.any():
        warn(
            f"the updates of LiSSA grew more than {GROWTH_LIMIT}-fold for {int(growing.sum())} of "
            f"{len(first)} right-hand sides: the recursion diverges or its batches are too noisy. "
            f"Raise scaling (now {scale:g}), damping or the batch size",
            ConvergenceWarning,
        )


class LissaOperator(InverseOperator):
    r"""The inverse :math:`b \mapsto (A + (\lambda + d s) I)^{-1} b` by LiSSA.

    .. math:: h \leftarrow b + (1 - d) h - (A_t + \lambda I) h / s, \qquad \text{answer } h / s

    with :math:`A_t` the matrix of the t-th batch (Agarwal, Bullins & Hazan 2017; Koh & Liang 2017).
    The batches come as the loader gives them, pass after pass; a short last one is a step like the
    others. With all data in one batch it converges to the solution when the eigenvalues of
    :math:`(A + \lambda I) / s + d I` lie between 0 and 2. With several it keeps the noise of the
    batches, which more points in a batch, a larger `scale` or more chains reduce.

    The outcome is decided by the *true* residual with all data, relative to ‖b‖: that of a
    right-hand side is measured once its updates have stayed below the tolerance for a whole pass,
    and at the end. Where a recursion grows beyond what stable ones can, it is stopped as
    *diverged*; the error, and `Solution.detail`, say which argument to change and to what.

    `apply` and `solve` take a vector ``(n,)`` or the rows of a stack ``(k, n)`` of A's dtype and
    answer in the same shape. `apply` raises a `SolverError` where the value would be meaningless
    and warns (`ConvergenceWarning`) where it is short of the tolerance; `solve` reports both.

    Args:
        batch_operation: The matrix of a batch; see `BatchOperator`.
        data: A ``DataLoader``, list of batches or other iterable that can be iterated again.
        regularization: λ >= 0; ``None`` is 0.
        maxiter: Most steps of each chain; a step is one batch.
        dampen: d, 0 <= d < 2. It changes the answer, by d·s on the diagonal.
        scale: s > 0. ``"auto"`` takes the smallest one that is safe, from an estimate of the
            largest eigenvalue of any batch: ten products with each batch, once. With several
            batches it is twice the smallest that is stable, so that no step overshoots.
        rtol: Relative tolerance.
        progress: Shows a progress bar with the steps and the largest relative update.
        warn_on_max_iteration: ``True`` warns and logs when a solve stops short of its tolerance,
            ``False`` logs at DEBUG.
        h0: h at the beginning, ``(n,)`` or one for each right-hand side; ``None`` is b. The x0 of
            `solve` goes first: it starts at h = s·x0.
        num_chains: Chains that are averaged, each with another order of a loader that shuffles, or
            begun at another batch of one that does not.
        generator: Seeds the order of each chain and the estimate; without one, `torch.manual_seed`
            decides, and equal calls give equal results.
        unpack: Function from a raw batch to ``(x, y)``; ``None`` expects pairs.
        cache: What may be kept on the device; see `BatchStream`. Chains over a loader that shuffles
            load their batches.
        averaging: The weights of the batches in the matrix A of the true residual. With a
            `hessops.DistributedAveraging` a step is an application of the matrix of all data, as of
            `from_operator`: processes have no batches in common.

    Raises:
        ArgumentTypeError: An argument is of another type.
        ArgumentError: A number is out of range.
        DtypeError: Half precision.
        ShapeError, NonFiniteError: `h0` does not fit.
        StructureError: ``scale="auto"`` for a matrix that is known to be non-symmetric.
        DataError: `data` are empty or one-shot.

    Example:
        >>> import torch
        >>> from hessops import HessianBatchOperation, LissaOperator
        >>> model = torch.nn.Linear(1, 1, bias=False)
        >>> operation = HessianBatchOperation(model, torch.nn.MSELoss())
        >>> batches = [(torch.ones(3, 1), torch.zeros(3, 1)), (torch.ones(3, 1), torch.zeros(3, 1))]
        >>> LissaOperator(operation, batches, scale=4.0).apply(torch.ones(1)).round(decimals=3)
        tensor([0.5000])
    """

    def __init__(
        self,
        batch_operation: BatchOperation,
        data: Iterable[object],
        regularization: float | None = None,
        maxiter: int = 1000,
        dampen: float = 0.0,
        scale: Scale = 10.0,
        rtol: float = 1e-4,
        progress: bool = False,
        warn_on_max_iteration: bool = True,
        *,
        h0: Tensor | None = None,
        num_chains: int = 1,
        generator: torch.Generator | None = None,
        unpack: Unpack | None = None,
        cache: str | bool | int = "auto",
        averaging: Averaging = POINT_AVERAGING,
    ) -> None:
        operator = BatchOperator(batch_operation, data, averaging, cache=cache, unpack=unpack)
        is_distributed = operator.processes is not ONE_PROCESS
        if is_distributed and num_chains != 1:
            raise ArgumentError(
                f"num_chains is {num_chains}, but over several processes every step takes all the "
                "data, so that all chains are the same: leave it out"
            )
        self._configure(
            operator,
            _DataSteps(operator) if is_distributed else _BatchSteps(operator),
            regularization,
            maxiter=maxiter,
            dampen=dampen,
            scale=scale,
            rtol=rtol,
            progress=progress,
            warn_on_max_iteration=warn_on_max_iteration,
            h0=h0,
            num_chains=num_chains,
            generator=generator,
        )

    @classmethod
    def from_operator(
        cls,
        operator: TensorOperator,
        regularization: float | None = None,
        maxiter: int = 1000,
        dampen: float = 0.0,
        scale: Scale = 10.0,
        rtol: float = 1e-4,
        progress: bool = False,
        warn_on_max_iteration: bool = True,
        *,
        h0: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Self:
        """The recursion with a whole operator in every step, so that a step is one application.

        It is deterministic and converges linearly; `CgOperator` needs far fewer applications.

        Args:
            operator: A, any operator of float32 or float64.
            regularization: λ, like all others as in the constructor.
            maxiter: Most steps.
            dampen: d.
            scale: s, or ``"auto"`` by twenty applications, once.
            rtol: Relative tolerance.
            progress: Shows a progress bar.
            warn_on_max_iteration: Whether a solve that stops short warns.
            h0: h at the beginning.
            generator: Draws the vectors for the estimate.

        Raises:
            HessopsError: As of the constructor.

        Example:
            >>> import torch
            >>> from hessops import DiagonalOperator, LissaOperator
            >>> A = DiagonalOperator(torch.tensor([1.0, 40.0]))
            >>> inverse = LissaOperator.from_operator(A, scale="auto")
            >>> inverse.apply(torch.ones(2)).round(decimals=3)
            tensor([1.0000, 0.0250])
        """
        lissa = cls.__new__(cls)
        lissa._configure(
            operator,
            _DataSteps(operator),
            regularization,
            maxiter=maxiter,
            dampen=dampen,
            scale=scale,
            rtol=rtol,
            progress=progress,
            warn_on_max_iteration=warn_on_max_iteration,
            h0=h0,
            num_chains=1,
            generator=generator,
        )
        return lissa

    def _configure(
        self,
        operator: TensorOperator,
        steps: _Steps,
        regularization: float | None,
        *,
        maxiter: int,
        dampen: float,
        scale: Scale,
        rtol: float,
        progress: bool,
        warn_on_max_iteration: bool,
        h0: Tensor | None,
        num_chains: int,
        generator: torch.Generator | None,
    ) -> None:
        super().__init__(operator, regularization, warn_on_max_iteration=warn_on_max_iteration)
        require_single_or_double(operator.dtype, "operator", "LiSSA")
        self.maxiter = checked_count(maxiter, "maxiter")
        self.dampen = checked_number(dampen, "dampen", minimum=0)
        if self.dampen >= 2:
            raise ArgumentError(f"dampen must be below 2, or h alternates; got {self.dampen:g}")
        self.scale: Scale = _checked_scale(scale, operator)
        self.rtol = checked_number(rtol, "rtol", minimum=0)
        self.progress = progress
        self.num_chains = checked_count(num_chains, "num_chains")
        if generator is not None:
            resolved_generator(generator)
        self.generator = generator
        self.h0 = h0
        if h0 is not None:
            checked_rows(h0, operator.input_size, operator.dtype, operator.device, "h0")
            self.h0 = h0.detach().to(operator.device, copy=True)
        self._steps = steps
        # Smallest and largest eigenvalue of any batch, without λ, once they have been estimated.
        self._extremes: tuple[float, float] | None = None

    # --- the scale -----------------------------------------------------------------------

    @property
    def resolved_scale(self) -> float:
        """s, which ``scale="auto"`` estimates when it is first needed."""
        return self._safe_scale() if self.scale == "auto" else float(self.scale)

    def _safe_scale(self) -> float:
        smallest, largest = (value + self.regularization for value in self._spectrum())
        size = max(abs(largest), abs(smallest), torch.finfo(self.dtype).tiny)
        margin = SCALE_MARGIN if self._steps.period == 1 else SCALE_MARGIN_OF_BATCHES
        return margin * size / (2 - self.dampen)

    def _spectrum(self) -> tuple[float, float]:
        if self._extremes is None:
            source = resolved_generator(self.generator)
            # The caller's generator decides, but estimating must not advance what chains draw from.
            probe = torch.Generator().manual_seed(source.initial_seed())
            with isolated(self.device):
                self._extremes = self._steps.extreme_eigenvalues(probe)
        return self._extremes

    @property
    def system(self) -> TensorOperator:
        """A + (λ + d·s) I, whose inverse the recursion tends to."""
        shift = self.regularization
        if self.dampen:
            shift += self.dampen * self.resolved_scale
        return self.operator.shift(shift) if shift else self.operator

    # --- solving -------------------------------------------------------------------------

    def _solve_rows(
        self, rhs: Tensor, start: Tensor | None = None, *, history: bool = False
    ) -> Solution:
        scale = self.resolved_scale
        problem = Problem.scaled(
            rhs,
            start,
            rtol=self.rtol,
            maxiter=self.maxiter,
            keeps_history=history,
        )
        outcomes = Outcomes(problem)
        source = resolved_generator(self.generator)
        first = self._first_iterate(problem, scale)
        not_symmetric = self.operator.symmetric is False
        patience = DIVERGENCE_FACTOR_OF_OTHERS if not_symmetric else DIVERGENCE_FACTOR
        chains = [
            _Chain(problem, first, self.dampen, scale, patience, outcomes if number == 0 else None)
            for number in range(self.num_chains)
        ]
        steps = self.maxiter * self.num_chains
        with progress_bar("LiSSA", "step", steps, show=self.progress) as bar:
            for number, chain in enumerate(chains):
                self._run(chain, self._steps.replay(_seed(source), number, self.num_chains), bar)
        return self._concluded(problem, outcomes, chains, scale)

    def _first_iterate(self, problem: Problem, scale: float) -> Tensor:
        if problem.start is not None:
            first = scale * problem.start
        elif self.h0 is None:
            first = problem.rhs
        elif self.h0.ndim == 2 and len(self.h0) != len(problem.rhs):
            raise ShapeError(
                f"h0 has {len(self.h0)} rows, but there are {len(problem.rhs)} right-hand sides"
            )
        else:
            first = self.h0.expand_as(problem.rhs) / problem.scales
        # A start whose norm leaves the range of the dtype is no use.
        usable = first.norm(dim=1, keepdim=True).isfinite()
        return torch.where(usable, first, problem.rhs)

    def _run(self, chain: _Chain, products: Iterator[RowsProduct], bar: Bar) -> None:
        """Steps until every row of a chain is verified, has diverged or the steps are used up."""
        while not chain.is_finished():
            product = next(products)
            chain.step(partial(_regularized, product, self.regularization))
            quiet = chain.quiet_rows(self._steps.patience(chain.num_steps))
            if bool(quiet.any()):
                chain.verify(quiet, self.system._product)
            if bar.is_shown:
                bar.say(largest_update=f"{chain.largest_update():.1e}")
                bar.advance()

    def _concluded(
        self, problem: Problem, outcomes: Outcomes, chains: list[_Chain], scale: float
    ) -> Solution:
        diverged = torch.stack([chain.diverged for chain in chains]).any(dim=0)
        non_finite = torch.stack([chain.non_finite for chain in chains]).any(dim=0)
        every = torch.ones_like(diverged)
        mean = torch.stack([chain.current for chain in chains]).mean(dim=0) / scale
        value = torch.where((diverged | non_finite).unsqueeze(1), 0.0, mean)
        norms = (problem.rhs - self.system._product(value)).norm(dim=1)
        norms = torch.where(non_finite, outcomes.rhs_norms, norms)
        outcomes.decide(non_finite, SolveStatus.NON_FINITE)
        outcomes.decide(diverged, SolveStatus.DIVERGED)
        outcomes.iterations = torch.stack([chain.iterations for chain in chains]).amax(dim=0)
        outcomes.keep(norms, every)
        outcomes.measured(value, norms, every)
        outcomes.decide(every, SolveStatus.MAX_ITERATIONS)
        applications = sum(chain.num_products for chain in chains) + 1
        converged = bool((outcomes.status == CODE[SolveStatus.CONVERGED]).all())
        detail = self._detail(scale, diverged=bool(diverged.any()), converged=converged)
        return outcomes.solution(applications, self.system._product, detail)

    def _choice(self, scale: float) -> str:
        if self.scale != "auto":
            return ""
        largest = max(abs(value + self.regularization) for value in self._spectrum())
        return (
            f"scale={scale:.4g}, chosen for a largest absolute eigenvalue {self._steps.whose} of "
            f"about {largest:.3g}, regularization included."
        )

    def _noise(self) -> str:
        if self._steps.period == 1:
            return ""
        return (
            "Steps of several batches keep their noise: more points in a batch, a larger scale or "
            "more chains reduce it."
        )

    def _detail(self, scale: float, *, diverged: bool, converged: bool) -> str:
        if not diverged:
            return " ".join(filter(None, [self._choice(scale), "" if converged else self._noise()]))
        if self.operator.symmetric is False:
            return (
                f"scale={scale:g} must exceed half of |a|²/Re(a) for every eigenvalue a of the "
                "operator with its regularization, and all Re(a) must be positive."
            )
        try:
            smallest, largest = (value + self.regularization for value in self._spectrum())
        except NonFiniteProductError:
            return "Its eigenvalues cannot be estimated: a product was NaN or infinite."
        return self._explained(scale, smallest, largest)

    def _explained(self, scale: float, smallest: float, largest: float) -> str:
        """Which argument made it diverge, and what value of it would not."""
        whose, reasons = self._steps.whose, []
        least = largest / (2 - self.dampen)
        if scale < SCALE_MARGIN * least:
            reasons.append(
                f"scale={scale:g} is too small: the largest eigenvalue {whose} is about "
                f"{largest:.3g}, regularization included, so that scale must exceed {least:.3g}; "
                f"scale={self._safe_scale():.4g} is stable, and scale='auto' chooses it."
            )
        # A Ritz value of zero may be a little negative.
        if smallest + self.dampen * scale < -CURVATURE_SHARE * abs(largest):
            reasons.append(
                f"There is negative curvature: the smallest eigenvalue {whose} is about "
                f"{smallest:.3g}, regularization included. Add more than {-smallest:.3g} to "
                f"regularization (now {self.regularization:g})"
                + (f", or make dampen exceed {-smallest / scale:.3g}" if -smallest < scale else "")
                + "."
            )
        return " ".join(reasons) or (
            f"The eigenvalues {whose} were estimated to lie between {smallest:.3g} and "
            f"{largest:.3g}, regularization included, for which scale={scale:g} should do: "
            "start nearer, or, where batches differ more than the estimate saw, raise scale or "
            "their size."
        )

    # --- elsewhere -----------------------------------------------------------------------

    def refresh(self) -> Self:
        """Lets the operator take a new copy of its model; the scale is estimated anew."""
        super().refresh()
        self._extremes = None
        return self

    def _move(self, device: torch.device) -> Self:
        moved = super()._move(device)
        moved.h0 = None if self.h0 is None else self.h0.to(device)
        moved._steps = type(self._steps)(moved.operator)
        return moved

    def _label(self) -> str:
        scale = "'auto'" if self.scale == "auto" else f"{self.scale:g}"
        return (
            f"LissaOperator(regularization={self.regularization:g}, maxiter={self.maxiter}, "
            f"dampen={self.dampen:g}, scale={scale}, rtol={self.rtol:g})"
        )


@dataclass(eq=False)
class _Chain:
    """One recursion for all right-hand sides; each stops on its own.

    Attributes:
        problem: The right-hand sides.
        current: h, ``(k, n)``.
        dampen: d.
        scale: s.
        patience: How much longer than a stable symmetric recursion allows an iterate may be.
        record: Where the norms of the updates are kept, if anywhere.
    """

    problem: Problem
    current: Tensor
    dampen: float
    scale: float
    patience: float
    record: Outcomes | None

    def __post_init__(self) -> None:
        self.current = self.current.clone()
        self.rhs_norms = self.problem.rhs.norm(dim=1)
        self.first_norms = self.current.norm(dim=1)
        solved = self.rhs_norms <= self.problem.tolerances
        self.current.masked_fill_(solved.unsqueeze(1), 0.0)
        self.active = ~solved
        self.diverged = torch.zeros_like(solved)
        self.non_finite = torch.zeros_like(solved)
        self.iterations = torch.zeros_like(solved, dtype=torch.int64)
        # Steps in succession with an update below what is looked for.
        self.quiet = torch.zeros_like(self.iterations)
        self.looked_for = QUIET_FACTOR * self.problem.tolerances
        self.update_norms = torch.zeros_like(self.rhs_norms)
        self.num_products = self.num_steps = 0
        self.all_active = False

    def is_finished(self) -> bool:
        if self.num_steps >= self.problem.maxiter:
            return True
        active = int(self.active.sum())
        # Whether no row has to be masked in the next step.
        self.all_active = active == len(self.active)
        return active == 0

    def step(self, product: RowsProduct) -> None:
        rows = self.active.unsqueeze(1)
        moving = self.current if self.all_active else torch.where(rows, self.current, 0.0)
        update = lissa_update(
            moving, product, self.problem.rhs, dampen=self.dampen, scale=self.scale
        )
        del moving
        self.num_products += 1
        self.update_norms = update.norm(dim=1)
        if self.record is not None:
            self.record.keep(self.update_norms, self.active)
        finite = finite_rows(update)
        self.current += update if self.all_active else update.masked_fill_(~rows, 0.0)
        del update
        self.num_steps += 1
        self.iterations = self.iterations + self.active
        bound = self.first_norms + self.iterations * self.rhs_norms
        # From an iterate within its bound, only a product can lead to what is not finite.
        self.non_finite = self.non_finite | (self.active & ~finite)
        grown = self.active & ~(self.current.norm(dim=1) <= self.patience * bound)
        self.diverged = self.diverged | (grown & ~self.non_finite)
        self.active = self.active & ~(self.diverged | self.non_finite)
        is_quiet = self.update_norms <= self.looked_for
        self.quiet = torch.where(self.active & is_quiet, self.quiet + 1, 0)

    def quiet_rows(self, patience: int | None) -> Tensor:
        """The rows that have been quiet for a whole pass, whose true residual is worth a look."""
        if patience is None:
            return torch.zeros_like(self.active)
        rows: Tensor = self.active & (self.quiet >= patience)
        return rows

    def verify(self, rows: Tensor, product: RowsProduct) -> None:
        """Ends the rows whose true residual meets the tolerance; the others go on for longer."""
        iterate = torch.where(rows.unsqueeze(1), self.current, 0.0) / self.scale
        norms = (self.problem.rhs - product(iterate)).norm(dim=1)
        self.num_products += 1
        self.active = self.active & ~(rows & (norms <= self.problem.tolerances))
        self.looked_for = torch.where(rows, QUIETER_FACTOR * self.looked_for, self.looked_for)
        self.quiet = torch.where(rows, 0, self.quiet)

    def largest_update(self) -> float:
        safe = torch.where(self.rhs_norms > 0, self.rhs_norms, 1.0)
        return float(torch.where(self.active, self.update_norms / safe, 0.0).max().item())


class _Steps(ABC):
    """Where the matrices of the steps come from.

    Attributes:
        period: Steps that make a pass over the data; ``None`` until that is known.
        whose: Whose eigenvalues are estimated, for messages.
    """

    period: int | None
    whose: str

    @abstractmethod
    def __init__(self, operator: TensorOperator) -> None: ...

    @abstractmethod
    def replay(self, seed: int, chain: int, num_chains: int) -> Iterator[RowsProduct]:
        """Endless steps of one chain."""

    def patience(self, num_steps: int) -> int | None:
        """The period, in a chain that has taken so many steps; ``None`` where it is too early."""
        return self.period

    @abstractmethod
    def extreme_eigenvalues(self, generator: torch.Generator) -> tuple[float, float]:
        """Estimates of the smallest and the largest eigenvalue of any step."""


class _DataSteps(_Steps):
    """All data in every step."""

    period = 1
    whose = "of the operator"

    def __init__(self, operator: TensorOperator) -> None:
        self.operator = operator

    def replay(self, seed: int, chain: int, num_chains: int) -> Iterator[RowsProduct]:
        while True:
            yield self.operator._product

    def extreme_eigenvalues(self, generator: torch.Generator) -> tuple[float, float]:
        return _extremes(self.operator._product, self.operator, LANCZOS_STEPS_OF_DATA, generator)


class _BatchSteps(_Steps):
    """A batch in every step, in the order of the loader."""

    whose = "of a batch"

    def __init__(self, operator: TensorOperator) -> None:
        if not isinstance(operator, BatchOperator):
            raise TypeError(f"expected a BatchOperator, got {type(operator).__name__}")
        self.operator = operator
        self.period = None

    def replay(self, seed: int, chain: int, num_chains: int) -> Iterator[RowsProduct]:
        stream = self.operator.stream
        if not stream.has_fixed_order:
            stream = stream.replayed(seed)
        elif chain:
            # The order is the same in every chain; where it begins is not.
            yield from self._rest_of_pass(stream, chain, num_chains)
        while True:
            yield from self._one_pass(stream)

    def patience(self, num_steps: int) -> int | None:
        # As in a first solve, which knows it from the end of a pass on: equal solves are equal.
        return self.period if self.period is not None and num_steps > self.period else None

    def _rest_of_pass(
        self, stream: BatchStream, chain: int, num_chains: int
    ) -> Iterator[RowsProduct]:
        skipped = chain * (self.period or sum(1 for _ in stream)) // num_chains
        for position, product in enumerate(self._one_pass(stream)):
            if position >= skipped:
                yield product

    def _one_pass(self, stream: BatchStream) -> Iterator[RowsProduct]:
        count = 0
        for batch in self.operator.checked_batches(stream):
            count += 1
            yield partial(self.operator.batch_operation.apply_rows, batch)
        self.period = count

    def extreme_eigenvalues(self, generator: torch.Generator) -> tuple[float, float]:
        found = [
            _extremes(product, self.operator, LANCZOS_STEPS_OF_BATCH, generator)
            for product in self._one_pass(self.operator.stream)
        ]
        return min(low for low, _ in found), max(high for _, high in found)


def _extremes(
    product: RowsProduct, operator: TensorOperator, steps: int, generator: torch.Generator
) -> tuple[float, float]:
    """The smallest Ritz value, and the largest one with its residual: what it may be short of."""

    def multiply(vector: Tensor) -> Tensor:
        image: Tensor = product(vector.to(operator.dtype).unsqueeze(0))[0].to(torch.float64)
        return image

    pairs = ritz_pairs(
        multiply,
        operator.input_size,
        max_iter=steps,
        tol=0.0,
        generator=generator,
        device=operator.device,
        with_vectors=False,
    )
    return pairs.values[0].item(), (pairs.values[-1] + pairs.residual_norms[-1]).item()


def _regularized(product: RowsProduct, shift: float, rows: Tensor) -> Tensor:
    return product(rows) + shift * rows if shift else product(rows)


def _seed(source: torch.Generator) -> int:
    return int(torch.randint(2**62, (), generator=source, device=source.device))


def _checked_scale(scale: object, operator: TensorOperator) -> Scale:
    if isinstance(scale, str):
        if scale != "auto":
            raise ArgumentError(f"scale must be a positive number or 'auto', got {scale!r}")
        if operator.symmetric is False:
            raise StructureError(
                f"scale='auto' estimates eigenvalues of a symmetric operator, but "
                f"{type(operator).__name__} is not symmetric; pass a number"
            )
        return "auto"
    return checked_number(scale, "scale", minimum=0, exclusive=True)
