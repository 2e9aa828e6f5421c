"""The same by loops over points and layers."""

import torch
from explicit_matrices import gauss_newton, outputs, theta
from setting import loss, model, x, y
from torch import nn
from torch.func import functional_call, grad, jacrev

v = torch.randn(334, generator=torch.Generator().manual_seed(1), dtype=x.dtype)
hidden = torch.tanh(model[0](x)).detach()
probabilities = outputs(theta).softmax(dim=1)
of_logits = torch.diag_embed(probabilities) - torch.einsum(
    "ni,nj->nij", probabilities, probabilities
)
values, vectors = torch.linalg.eigh(of_logits)
roots = (vectors * values.clamp(min=0).sqrt().unsqueeze(1)).transpose(1, 2)  # (n, columns, 10)
labels = nn.functional.one_hot(y, 10)
weight = model[2].weight.detach()


def behind(columns):
    """Gradients by the outputs of both layers for gradients by the logits."""
    return columns @ weight * (1 - hidden.square()).unsqueeze(1), columns


def factors(columns, with_bias=True):
    """A, B and the matrices G of all points and columns, for both layers."""
    for inputs, b in zip((x, hidden), behind(columns), strict=True):
        ones = torch.ones_like(inputs[:, :1])
        a = torch.cat([inputs, ones], dim=1) if with_bias else inputs
        gradients = torch.einsum("ncj,nk->ncjk", b, a)
        yield a.T @ a / 250, torch.einsum("nci,ncj->ij", b, b) / 250, gradients


def in_theirs_order(matrix, count_in, count_out):
    """From rows of [weight, bias] to all weights, then all biases."""
    places = torch.arange(matrix.shape[0]).reshape(count_out, count_in + 1)
    order = torch.cat([places[:, :-1].flatten(), places[:, -1]])
    return matrix[order][:, order]


def assembled(blocks):
    sizes = [(16, 12), (12, 10)]
    return torch.block_diag(
        *[in_theirs_order(block, *size) for block, size in zip(blocks, sizes, strict=True)]
    )


def ekfac_block(a, b, gradients):
    q_a, q_b = torch.linalg.eigh(a)[1], torch.linalg.eigh(b)[1]
    corrected = (q_b.T @ gradients @ q_a).square().sum(dim=1).mean(dim=0)
    basis = torch.kron(q_b, q_a)
    return basis @ torch.diag(corrected.flatten()) @ basis.T


def heuristic_inverse(a, b):
    pi = (a.trace() / len(a) / (b.trace() / len(b))).sqrt()
    damped_a = a + pi * 0.01**0.5 * torch.eye(len(a), dtype=a.dtype)
    damped_b = b + 0.01**0.5 / pi * torch.eye(len(b), dtype=b.dtype)
    return torch.kron(torch.linalg.inv(damped_b), torch.linalg.inv(damped_a))


kfac = assembled([torch.kron(b, a) for a, b, _ in factors(roots)])
gradients_by_logits = (probabilities - labels).unsqueeze(1)
empirical = assembled([torch.kron(b, a) for a, b, _ in factors(gradients_by_logits)])
apart = torch.block_diag(
    *[part for a, b, _ in factors(roots, with_bias=False) for part in (torch.kron(b, a), b)]
)
ekfac = assembled([ekfac_block(*found) for found in factors(roots)])
heuristic = assembled([heuristic_inverse(a, b) for a, b, _ in factors(roots)])
shift = 0.01 * torch.eye(334, dtype=x.dtype)
assert abs(ekfac.trace() - gauss_newton(loss).trace()) < 1e-12  # as George et al. (2018) say

torch.manual_seed(0)
inner = nn.Linear(16, 16)
twice = nn.Sequential(inner, nn.Tanh(), inner, nn.Tanh(), nn.Linear(16, 10)).double().eval()
named = {name: p.detach() for name, p in twice.named_parameters()}
trace = 0.0
for point in x.split(1):
    jacobians = jacrev(lambda params, point=point: functional_call(twice, params, (point,))[0])(
        named
    )
    logits = functional_call(twice, named, (point,))[0]
    curvature = jacrev(grad(lambda out: loss(out, torch.tensor(0))))(logits)
    rows = torch.cat([j.reshape(10, -1) for j in jacobians.values()], dim=1)
    trace += (rows * (curvature @ rows)).sum() / 250

results = {
    "KFAC": kfac @ v,
    "KFAC, empirical": empirical @ v,
    "KFAC, weights and biases apart": apart @ v,
    "EKFAC": ekfac @ v,
    "inverse of KFAC, exact damping": torch.linalg.solve(kfac + shift, v),
    "inverse of KFAC, heuristic damping": heuristic @ v,
    "inverse of EKFAC": torch.linalg.solve(ekfac + shift, v),
    "trace and norm of EKFAC": torch.stack([ekfac.trace(), ekfac.norm()]),
    "trace of EKFAC, a layer called twice": trace,
}
