"""ParameterSpace: the one place that orders, flattens, validates and splits parameters."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterable, Mapping

import pytest
import torch
from torch import Tensor, nn

from hessops import HessianOperator, ParameterSpace
from hessops.errors import (
    ArgumentTypeError,
    DeviceError,
    DtypeError,
    HessopsError,
    ModelError,
    ParameterNameError,
    ShapeError,
)


class TiedModel(nn.Module):
    """`decoder.weight` and `encoder.weight` are one parameter; `scale` has no dimensions."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Linear(3, 3)
        self.scale = nn.Parameter(torch.tensor(0.5))
        self.decoder = nn.Linear(3, 3)
        self.decoder.weight = self.encoder.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * self.decoder(torch.tanh(self.encoder(x)))


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 1))


def half_frozen() -> nn.Sequential:
    model = mlp()
    model[0].bias.requires_grad_(False)
    return model


MODELS: dict[str, Callable[[], nn.Module]] = {
    "mlp": mlp,
    "frozen": half_frozen,
    "tied": TiedModel,
    "convolution": lambda: nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2)),
}


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def random_entries(space: ParameterSpace, lead: tuple[int, ...] = ()) -> dict[str, Tensor]:
    return {name: torch.randn((*lead, *shape)) for name, shape in space.shapes.items()}


def reordered(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return dict(reversed(tensors.items()))


# --- order ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_flat_order_is_that_of_the_trainable_named_parameters(name: str) -> None:
    model = MODELS[name]()
    space = ParameterSpace.from_model(model)
    assert space.names == tuple(trainable(model))
    assert space.size == sum(p.numel() for p in trainable(model).values())
    expected = nn.utils.parameters_to_vector(trainable(model).values())
    assert torch.equal(space.flatten(trainable(model)), expected)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("lead", [(), (0,), (1,), (4,)], ids=str)
def test_flatten_and_unflatten_undo_each_other(name: str, lead: tuple[int, ...]) -> None:
    space = ParameterSpace.from_model(MODELS[name]())
    entries = random_entries(space, lead)
    vector = space.flatten(entries)
    assert vector.shape == (*lead, space.size)
    back = space.unflatten(vector)
    assert list(back) == list(space.names)
    assert all(torch.equal(back[key], entries[key]) for key in entries)
    assert torch.equal(space.flatten(back), vector)


@pytest.mark.parametrize("lead", [(), (3,)], ids=str)
def test_reordered_keys_mean_the_same_vector(lead: tuple[int, ...]) -> None:
    space = ParameterSpace.from_model(mlp())
    entries = random_entries(space, lead)
    assert torch.equal(space.flatten(reordered(entries)), space.flatten(entries))


def test_slices_cut_the_flat_vector_into_its_entries() -> None:
    space = ParameterSpace.from_model(TiedModel())
    entries = random_entries(space)
    vector = space.flatten(entries)
    for name, where in space.slices.items():
        assert torch.equal(vector[where], entries[name].reshape(-1))


def test_entries_of_unflatten_are_views() -> None:
    space = ParameterSpace.from_model(mlp())
    vector = torch.zeros(space.size)
    space.unflatten(vector)["0.weight"].fill_(1.0)
    assert vector.sum() == 6


def test_from_tensors_keeps_the_order_of_its_keys() -> None:
    space = ParameterSpace.from_tensors({"b": torch.zeros(2), "a": torch.zeros(1)})
    assert space.flatten({"a": torch.ones(1), "b": torch.zeros(2)}).tolist() == [0, 0, 1]


def test_a_parameter_without_entries_takes_no_place() -> None:
    space = ParameterSpace.from_tensors({"none": torch.zeros(0, 3), "some": torch.zeros(2)})
    assert space.size == 2
    assert space.unflatten(torch.ones(5, 2))["none"].shape == (5, 0, 3)


# --- tied parameters -----------------------------------------------------------------------------


def test_a_tied_parameter_appears_once_under_its_first_name() -> None:
    space = ParameterSpace.from_model(TiedModel())
    assert space.names == ("scale", "encoder.weight", "encoder.bias", "decoder.bias")
    assert space.aliases == (("decoder.weight", "encoder.weight"),)


USES_OF_A_NAME: dict[str, Callable[[TiedModel, ParameterSpace, str], tuple[str, ...]]] = {
    "resolve": lambda _, space, name: (space.resolve(name),),
    "subspace": lambda _, space, name: space.subspace([name]).names,
    "split": lambda _, space, name: space.split({"block": [name]})["block"].names,
    "restrict_to": lambda model, _, name: ParameterSpace.from_model(model, [name]).names,
    "restrict_to a dictionary": lambda model, _, name: (
        ParameterSpace.from_model(model, {name: model.get_parameter(name)}).names
    ),
}


@pytest.mark.parametrize("name", ["encoder.weight", "decoder.weight"])
@pytest.mark.parametrize("use", USES_OF_A_NAME)
def test_every_name_of_a_tied_parameter_means_the_first(use: str, name: str) -> None:
    model = TiedModel()
    space = ParameterSpace.from_model(model)
    assert USES_OF_A_NAME[use](model, space, name) == ("encoder.weight",)


def test_every_name_of_a_tied_parameter_is_accepted_in_a_dictionary() -> None:
    space = ParameterSpace.from_model(TiedModel())
    entries = random_entries(space)
    expected = space.flatten(entries)
    entries["decoder.weight"] = entries.pop("encoder.weight")
    assert torch.equal(space.flatten(entries), expected)


def test_indices_are_those_of_the_first_name() -> None:
    space = ParameterSpace.from_model(TiedModel())
    assert torch.equal(space.indices(["decoder.weight"]), space.indices(["encoder.weight"]))


def test_a_subspace_keeps_the_aliases_of_its_parameters_only() -> None:
    space = ParameterSpace.from_model(TiedModel())
    assert space.subspace(["decoder.weight"]).resolve("decoder.weight") == "encoder.weight"
    with pytest.raises(ParameterNameError, match=r"decoder\.weight"):
        space.subspace(["scale"]).resolve("decoder.weight")


def test_a_parameter_under_both_of_its_names_is_refused() -> None:
    space = ParameterSpace.from_model(TiedModel())
    entries = random_entries(space)
    entries["decoder.weight"] = entries["encoder.weight"]
    with pytest.raises(ParameterNameError, match=r"decoder\.weight"):
        space.flatten(entries)


# --- entries that do not fit ---------------------------------------------------------------------


def _without(name: str) -> Callable[[dict[str, Tensor]], object]:
    return lambda entries: {key: t for key, t in entries.items() if key != name}


def _with(name: str, value: object) -> Callable[[dict[str, Tensor]], object]:
    return lambda entries: {**entries, name: value}


BAD_ENTRIES: dict[str, tuple[Callable[[dict[str, Tensor]], object], type[HessopsError], str]] = {
    "missing": (_without("2.weight"), ParameterNameError, r"2\.weight"),
    "unknown": (_with("3.weight", torch.zeros(1)), ParameterNameError, r"3\.weight"),
    "key that is no string": (_with(7, torch.zeros(1)), ParameterNameError, "7"),  # type: ignore[arg-type]
    "mis-shaped": (_with("0.bias", torch.zeros(4)), ShapeError, r"0\.bias"),
    "transposed": (_with("0.weight", torch.zeros(2, 3)), ShapeError, r"0\.weight"),
    "too few dimensions": (_with("0.weight", torch.zeros(6)), ShapeError, r"0\.weight"),
    "too many dimensions": (_with("0.bias", torch.zeros(1, 1, 3)), ShapeError, r"0\.bias"),
    "stack among vectors": (_with("2.bias", torch.zeros(1, 1)), ShapeError, r"2\.bias"),
    "wrong dtype": (_with("2.bias", torch.zeros(1).double()), DtypeError, r"2\.bias"),
    "list for a tensor": (_with("2.bias", [0.0]), ArgumentTypeError, r"2\.bias"),
    "no dictionary": (lambda entries: list(entries.values()), ArgumentTypeError, "dictionary"),
}


@pytest.mark.parametrize("case", BAD_ENTRIES)
def test_an_entry_that_does_not_fit_is_an_error_naming_it(case: str) -> None:
    spoil, error, text = BAD_ENTRIES[case]
    space = ParameterSpace.from_model(mlp())
    with pytest.raises(error, match=text):
        space.flatten(spoil(random_entries(space)))  # type: ignore[arg-type]


def test_stacks_of_different_heights_are_refused() -> None:
    space = ParameterSpace.from_model(mlp())
    entries = random_entries(space, (2,)) | {"2.bias": torch.zeros(3, 1)}
    with pytest.raises(ShapeError, match=r"2\.bias"):
        space.flatten(entries)


@pytest.mark.parametrize("shape", [(12,), (14,), (2, 12), (1, 1, 13), ()], ids=str)
def test_unflatten_refuses_other_shapes(shape: tuple[int, ...]) -> None:
    space = ParameterSpace.from_model(mlp())
    assert space.size == 13
    with pytest.raises(ShapeError, match="13"):
        space.unflatten(torch.zeros(shape))


def test_unflatten_refuses_what_is_no_tensor() -> None:
    with pytest.raises(ArgumentTypeError, match="vector"):
        ParameterSpace.from_model(mlp()).unflatten([0.0] * 13)  # type: ignore[arg-type]


# --- restrict_to ---------------------------------------------------------------------------------

CHOSEN = ("2.bias", "0.weight")
SPELLINGS: dict[str, Callable[[nn.Module], Mapping[str, nn.Parameter] | Iterable[str]]] = {
    "dictionary": lambda model: {name: model.get_parameter(name) for name in CHOSEN},
    "list": lambda _: list(CHOSEN),
    "tuple": lambda _: CHOSEN,
    "set": lambda _: set(CHOSEN),
    "generator": lambda _: (name for name in CHOSEN),
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_restrict_to_keeps_the_models_order(spelling: str) -> None:
    model = mlp()
    space = ParameterSpace.from_model(model, SPELLINGS[spelling](model))
    assert space.names == ("0.weight", "2.bias")
    assert space.size == 7


BAD_RESTRICTIONS: dict[str, tuple[object, type[HessopsError], str]] = {
    "unknown name": (["0.weight", "nothing"], ParameterNameError, "nothing"),
    "unknown key": ({"nothing": nn.Parameter(torch.zeros(1))}, ParameterNameError, "nothing"),
    "frozen": (["0.bias"], ParameterNameError, r"frozen parameter '0\.bias'"),
    "foreign parameter": (
        {"0.weight": nn.Parameter(torch.zeros(3, 2))},
        ParameterNameError,
        r"0\.weight",
    ),
    "foreign tensor": ({"0.weight": torch.zeros(3, 2)}, ParameterNameError, r"0\.weight"),
    "empty list": ([], ParameterNameError, "empty"),
    "empty dictionary": ({}, ParameterNameError, "empty"),
    "one string": ("0.weight", ArgumentTypeError, "collection"),
    "number": (3, ArgumentTypeError, "collection"),
    "parameters": ([nn.Parameter(torch.zeros(1))], ArgumentTypeError, "Parameter"),
    "named parameters": (list(mlp().named_parameters()), ArgumentTypeError, "tuple"),
}


@pytest.mark.parametrize("case", BAD_RESTRICTIONS)
def test_restrict_to_that_cannot_be_meant_is_refused(case: str) -> None:
    restrict_to, error, text = BAD_RESTRICTIONS[case]
    with pytest.raises(error, match="restrict_to") as caught:
        ParameterSpace.from_model(half_frozen(), restrict_to)  # type: ignore[arg-type]
    caught.match(text)


# --- models without a space ----------------------------------------------------------------------


def _frozen() -> nn.Module:
    return nn.Linear(2, 1).requires_grad_(False)


def _mixed() -> nn.Module:
    return nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1).double())


def _on_two_devices() -> nn.Module:
    return nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1, device="meta"))


def _buffer_elsewhere() -> nn.Module:
    model = nn.Linear(2, 1)
    model.register_buffer("mask", torch.zeros(1, device="meta"))
    return model


BAD_MODELS: dict[str, tuple[Callable[[], object], type[HessopsError], str]] = {
    "nothing trainable": (_frozen, ModelError, "trainable"),
    "no parameters": (nn.ReLU, ModelError, "trainable"),
    "lazy": (lambda: nn.LazyLinear(2), ModelError, "weight"),
    "mixed dtypes": (_mixed, DtypeError, r"1\.weight"),
    "complex": (lambda: nn.Linear(2, 1, dtype=torch.complex64), DtypeError, "complex64"),
    "two devices": (_on_two_devices, DeviceError, r"1\.weight"),
    "buffer elsewhere": (_buffer_elsewhere, DeviceError, "mask"),
    "no module": (lambda: torch.tanh, ArgumentTypeError, "model"),
}


@pytest.mark.parametrize("case", BAD_MODELS)
def test_a_model_without_a_real_space_is_refused(case: str) -> None:
    build, error, text = BAD_MODELS[case]
    with pytest.raises(error, match=text):
        ParameterSpace.from_model(build())  # type: ignore[arg-type]


def test_frozen_parameters_may_have_another_dtype() -> None:
    model = nn.Sequential(nn.Linear(2, 2).half().requires_grad_(False), nn.Linear(2, 1))
    assert ParameterSpace.from_model(model).dtype == torch.float32


def test_no_tensors_make_no_space() -> None:
    with pytest.raises(ParameterNameError, match="empty"):
        ParameterSpace.from_tensors({})


# --- subspaces -----------------------------------------------------------------------------------


def test_a_subspace_is_in_the_order_of_the_whole() -> None:
    space = ParameterSpace.from_model(mlp())
    assert space.subspace(["2.weight", "0.weight"]).names == ("0.weight", "2.weight")


def test_indices_select_the_entries_of_the_named_parameters() -> None:
    space = ParameterSpace.from_model(mlp())
    entries = random_entries(space)
    indices = space.indices(["2.bias", "0.weight"])
    expected = space.subspace(["0.weight", "2.bias"]).flatten(
        {name: entries[name] for name in ("0.weight", "2.bias")}
    )
    assert indices.dtype == torch.int64
    assert torch.equal(space.flatten(entries)[indices], expected)


def test_split_gives_subspaces_that_cover_what_was_named() -> None:
    space = ParameterSpace.from_model(mlp())
    blocks = space.split({"last": ["2.bias", "2.weight"], "first": ["0.weight", "0.bias"]})
    assert {label: block.names for label, block in blocks.items()} == {
        "last": ("2.weight", "2.bias"),
        "first": ("0.weight", "0.bias"),
    }
    every = torch.cat([space.indices(block.names) for block in blocks.values()])
    assert torch.equal(every.sort().values, torch.arange(space.size))


BAD_SPLITS: dict[str, tuple[dict[str, object], type[HessopsError], str]] = {
    "overlap": ({"a": ["scale"], "b": ["scale", "encoder.bias"]}, ParameterNameError, "scale"),
    "overlap of aliases": (
        {"a": ["encoder.weight"], "b": ["decoder.weight"]},
        ParameterNameError,
        r"encoder\.weight",
    ),
    "twice in a block": ({"a": ["scale", "scale"]}, ParameterNameError, "scale"),
    "twice by an alias": (
        {"a": ["encoder.weight", "decoder.weight"]},
        ParameterNameError,
        r"decoder\.weight",
    ),
    "unknown": ({"a": ["nothing"]}, ParameterNameError, "nothing"),
    "empty block": ({"a": []}, ParameterNameError, "empty"),
    "string for a block": ({"a": "scale"}, ArgumentTypeError, "scale"),
}


@pytest.mark.parametrize("case", BAD_SPLITS)
def test_a_split_that_is_none_is_refused(case: str) -> None:
    blocks, error, text = BAD_SPLITS[case]
    with pytest.raises(error, match=text):
        ParameterSpace.from_model(TiedModel()).split(blocks)  # type: ignore[arg-type]


# --- a space as a value --------------------------------------------------------------------------


def used(space: ParameterSpace) -> ParameterSpace:
    """With every cached attribute filled."""
    space.unflatten(space.flatten(random_entries(space)))
    space.resolve(space.names[0])
    return space


COPIES: dict[str, Callable[[ParameterSpace], ParameterSpace]] = {
    "pickle": lambda space: pickle.loads(pickle.dumps(space)),
    "deepcopy": copy.deepcopy,
    "copy": copy.copy,
}


@pytest.mark.parametrize("how", COPIES)
def test_a_copy_is_equal_and_works(how: str) -> None:
    space = used(ParameterSpace.from_model(TiedModel()))
    twin = COPIES[how](space)
    assert twin == space
    assert hash(twin) == hash(space)
    assert twin.resolve("decoder.weight") == "encoder.weight"
    vector = torch.randn(space.size)
    assert torch.equal(twin.flatten(space.unflatten(vector)), vector)


def test_spaces_of_equal_models_are_equal() -> None:
    assert ParameterSpace.from_model(mlp()) == ParameterSpace.from_model(mlp())


DIFFERENT: dict[str, Callable[[], ParameterSpace]] = {
    "other parameters": lambda: ParameterSpace.from_model(mlp(), ["0.weight"]),
    "other dtype": lambda: ParameterSpace.from_model(mlp().double()),
    "other device": lambda: ParameterSpace.from_model(mlp()).to("meta"),
    "other order": lambda: ParameterSpace.from_tensors(reordered(trainable(mlp()))),
    "other shapes": lambda: ParameterSpace.from_tensors(
        {name: p.T for name, p in trainable(mlp()).items()}
    ),
}


@pytest.mark.filterwarnings("ignore:The use of `x.T` on tensors")
@pytest.mark.parametrize("case", DIFFERENT)
def test_spaces_that_differ_are_not_equal(case: str) -> None:
    assert DIFFERENT[case]() != ParameterSpace.from_model(mlp())


def test_a_space_is_frozen() -> None:
    space = ParameterSpace.from_model(mlp())
    with pytest.raises(AttributeError, match="names"):
        space.names = ("a",)  # type: ignore[misc]


def test_to_changes_the_device_only() -> None:
    space = ParameterSpace.from_model(mlp())
    moved = space.to("meta")
    assert (moved.device.type, moved.names, moved.shapes) == ("meta", space.names, space.shapes)
    assert moved.flatten(random_entries(space)).device.type == "meta"


# --- through an operator -------------------------------------------------------------------------


def test_operators_take_dictionaries_by_any_name_in_any_order() -> None:
    model = TiedModel().double()
    data = [(torch.randn(5, 3).double(), torch.randn(5, 3).double())]
    operator = HessianOperator(model, nn.MSELoss(), data)
    entries = {name: torch.randn(2, *p.shape).double() for name, p in model.named_parameters()}
    expected = operator.apply_to_dict(entries)
    renamed = reordered(entries)
    renamed["decoder.weight"] = renamed.pop("encoder.weight")
    result = operator.apply_to_dict(renamed)
    assert list(result) == list(operator.space.names)
    assert all(torch.equal(result[name], expected[name]) for name in expected)
