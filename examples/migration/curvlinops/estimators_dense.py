"""What is estimated."""

from explicit_matrices import gauss_newton
from setting import loss

matrix = gauss_newton(loss)

results = {
    "trace, Hutchinson": matrix.trace(),
    "trace, Hutch++": matrix.trace(),
    "trace, XTrace": matrix.trace(),
    "diagonal, Hutchinson": matrix.diagonal(),
    "diagonal, XDiag": matrix.diagonal(),
    "squared Frobenius norm": matrix.square().sum(),
    "trace of rank three, XTrace": 2.0,  # of (2/30) XᵀX, with 30 ones in X
}
