"""An operator of one's own, and inverses, eigenpairs and preconditioners, with pyDVL."""

import torch
from pydvl.influence.torch.base import TensorOperator
from pydvl.influence.torch.functional import operator_spectral_approximation
from pydvl.influence.torch.operator import (
    CgOperator,
    DirectSolveOperator,
    LowRankOperator,
    MatrixOperator,
)
from pydvl.influence.torch.preconditioner import NystroemPreconditioner

torch.manual_seed(0)
basis, _ = torch.linalg.qr(torch.randn(60, 60, dtype=torch.float64))
values = torch.logspace(0, -4, 60, dtype=torch.float64)
matrix = (basis * values) @ basis.T
rhs = torch.randn(4, 60, dtype=torch.float64)


class Spectral(TensorOperator):
    """A matrix from its eigenpairs."""

    @property
    def device(self):
        """Where products are computed."""
        return basis.device

    @property
    def dtype(self):
        """Dtype of the vectors."""
        return basis.dtype

    @property
    def input_size(self):
        """Their length."""
        return len(basis)

    def to(self, device):
        """The same operator; it stays where it is."""
        return self

    def _apply_to_vec(self, vec):
        return basis @ (values * (basis.T @ vec))


operator = Spectral()
preconditioner = NystroemPreconditioner(rank=20)
preconditioner.fit(operator, 1e-2)
pairs = operator_spectral_approximation(operator, rank=10, tol=1e-12)

results = {
    "products": operator.apply(rhs),
    "a matrix times a vector": MatrixOperator(matrix).apply(rhs[0]),
    "direct": DirectSolveOperator(matrix, regularization=1e-2).apply(rhs),
    "CG": CgOperator(operator, regularization=1e-2, maxiter=60).apply(rhs),
    "CG of a vector": CgOperator(operator, regularization=1e-2, maxiter=60).apply(rhs[0]),
    "CG, preconditioned": CgOperator(
        operator, regularization=1e-2, maxiter=60, preconditioner=preconditioner
    ).apply(rhs),
    "block CG": CgOperator(operator, regularization=1e-2, use_block_cg=True).apply(rhs),
    "low rank": LowRankOperator(pairs, regularization=1e-2).apply(rhs),
    "low rank, eigenspace alone": LowRankOperator(pairs, 1e-2, exact=False).apply(rhs),
    "eigenvalues": pairs.eigen_vals.sort().values,
}
