"""Kronecker factors as files: the same operator again, or an error."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from hessops import Damping, EkfacOperator, KfacOperator, load_factors
from hessops.errors import SingularOperatorError, StoreError

N = 9


class EveryKind(nn.Module):
    """Layers with Kronecker factors, an exact block, and an exact diagonal."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(6, 4)
        self.conv = nn.Conv1d(4, 4, 2, groups=2)
        self.norm = nn.BatchNorm1d(4)
        self.gain = nn.Parameter(torch.tensor([1.3]))
        self.head = nn.Linear(4, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.conv(self.embed(x).mT).mean(dim=2)) * self.gain)


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return EveryKind().double().eval()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "factors"


def operator(
    model: nn.Module, kind: type[KfacOperator] = KfacOperator, **keywords: object
) -> KfacOperator:
    torch.manual_seed(1)
    batches = [(torch.randint(6, (N, 5)), torch.randint(3, (N,)))]
    return kind(model, nn.CrossEntropyLoss(), batches, max_dense=4, **keywords)


@pytest.mark.parametrize("kind", [KfacOperator, EkfacOperator])
def test_what_was_saved_is_the_same_operator(
    kind: type[KfacOperator], model: nn.Module, path: Path
) -> None:
    given = operator(model, kind)
    given.save(path)
    loaded = load_factors(path, model)
    vectors = torch.randn(2, given.input_size, dtype=torch.float64)
    assert torch.equal(loaded.apply(vectors), given.apply(vectors))
    assert list(loaded.blocks) == list(given.blocks)
    inverses = [op.inverse(regularization=Damping(relative=0.1)) for op in (given, loaded)]
    assert torch.equal(inverses[0].apply(vectors), inverses[1].apply(vectors))
    assert loaded.trace() == given.trace()
    with pytest.raises(SingularOperatorError):
        loaded.inverse()


def test_the_eigenvalues_of_the_factors_are_saved_too(model: nn.Module, path: Path) -> None:
    given = operator(model)
    given.save(path)
    vector = torch.randn(given.input_size, dtype=torch.float64)
    damped = {"regularization": 0.1, "damping": "factored-tikhonov"}
    expected = given.inverse(**damped).apply(vector)
    assert torch.equal(load_factors(path, model).inverse(**damped).apply(vector), expected)


def test_some_of_the_parameters_are_loaded_as_they_were_restricted(
    model: nn.Module, path: Path
) -> None:
    names = ["head.weight", "gain"]
    given = operator(model, restrict_to=names)
    given.save(path)
    loaded = load_factors(path, model, names)
    assert loaded.space == given.space
    with pytest.raises(StoreError, match="does not hold factors of the parameters"):
        load_factors(path, model)


@pytest.mark.parametrize("what", ["parameter", "buffer"])
def test_factors_of_other_values_are_refused(what: str, model: nn.Module, path: Path) -> None:
    operator(model).save(path)
    with torch.no_grad():
        (model.head.weight if what == "parameter" else model.norm.running_mean).add_(1e-3)
    with pytest.raises(StoreError, match="other parameters or buffers"):
        load_factors(path, model)


def test_factors_of_another_model_are_refused(model: nn.Module, path: Path) -> None:
    operator(model).save(path)
    with pytest.raises(StoreError, match="does not hold factors of the parameters"):
        load_factors(path, nn.Linear(4, 3))


@pytest.mark.parametrize("key", ["eigenvalues", "output_basis", "form"])
def test_damaged_numbers_are_refused(key: str, model: nn.Module, path: Path) -> None:
    operator(model).save(path)
    content = torch.load(path, weights_only=True)
    tensor = content["blocks"]["conv"]["tensors"][key]
    tensor[(0,) * tensor.ndim] += 1
    torch.save(content, path)
    with pytest.raises(StoreError, match="is damaged"):
        load_factors(path, model)


@pytest.mark.parametrize("key", ["blocks", "checksum", "parameters", "format"])
def test_files_that_lack_something_are_refused(key: str, model: nn.Module, path: Path) -> None:
    operator(model).save(path)
    content = torch.load(path, weights_only=True)
    del content[key]
    torch.save(content, path)
    with pytest.raises(StoreError):
        load_factors(path, model)


def test_truncated_files_are_refused(model: nn.Module, path: Path) -> None:
    operator(model).save(path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(StoreError, match="is not a file of Kronecker factors"):
        load_factors(path, model)


def test_no_code_is_run(model: nn.Module, path: Path, tmp_path: Path) -> None:
    target = tmp_path / "written"

    class Crafted:
        def __reduce__(self) -> tuple[object, tuple[object, ...]]:
            return Path.touch, (target,)

    for save in (
        lambda: path.write_bytes(pickle.dumps(Crafted())),
        lambda: torch.save({"format": Crafted()}, path),
    ):
        save()
        with pytest.raises(StoreError, match="is not a file of Kronecker factors"):
            load_factors(path, model)
        assert not target.exists()


def test_a_file_is_written_whole_or_not_at_all(
    model: nn.Module, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path.write_bytes(b"what was there")

    def fail(*args: object, **keywords: object) -> None:
        raise OSError("disk full")

    given = operator(model)
    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(OSError, match="disk full"):
        given.save(path)
    assert path.read_bytes() == b"what was there"
    assert list(path.parent.iterdir()) == [path]


def test_a_file_that_is_not_there_is_no_damaged_one(model: nn.Module, path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        load_factors(path, model)
