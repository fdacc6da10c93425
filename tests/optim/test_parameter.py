"""An embedding weight that owes noise, and every way that PyTorch has to read it."""

from __future__ import annotations

import copy
import io
import pickle

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from privrec.errors import UsageError
from privrec.optim.parameter import LazyParameter, make_lazy, make_plain

ROWS, WIDTH, VARIANCE = 6, 200, 9.0


def indebted(layer=None):
    layer = layer or nn.Embedding(ROWS, WIDTH)
    with torch.no_grad():
        layer.weight.zero_()
    memory = make_lazy(layer.weight)
    memory.owe(VARIANCE / 2)
    memory.owe(VARIANCE / 2)
    return layer


def saved(thing):
    file = io.BytesIO()
    torch.save(thing, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


WAYS_OUT = {
    "parameter": lambda e: e.weight + 0,
    "state": lambda e: e.state_dict()["weight"],
    "data": lambda e: e.weight.data,
    "detach": lambda e: e.weight.detach(),
    "numpy": lambda e: torch.from_numpy(e.weight.detach().numpy()),
    "array": lambda e: torch.from_numpy(np.array(e.weight.data)),
    "list": lambda e: torch.tensor(e.weight.tolist()),
    "clone": lambda e: e.weight.clone(),
    "view": lambda e: e.weight.view(-1).view(ROWS, WIDTH),
    "index": lambda e: torch.stack([e.weight[i] for i in range(ROWS)]),
    "iteration": lambda e: torch.stack(list(e.weight)),
    "select": lambda e: e.weight.index_select(0, torch.arange(ROWS)),
    "product": lambda e: torch.eye(ROWS) @ e.weight,
    "linear": lambda e: functional.linear(torch.eye(WIDTH), e.weight).T,
    "stack": lambda e: torch.stack([e.weight])[0],
    "items": lambda e: torch.tensor([[w.item() for w in row] for row in e.weight]),
    "lookup": lambda e: e(torch.arange(ROWS)),
    "functional lookup": lambda e: functional.embedding(torch.arange(ROWS), e.weight),
    "bag": lambda e: functional.embedding_bag(torch.arange(ROWS)[:, None], e.weight, mode="sum"),
    "module copy": lambda e: copy.deepcopy(e).weight,
    "copy": lambda e: copy.copy(e.weight),
    "deep copy": lambda e: copy.deepcopy(e.weight),
    "pickle": lambda e: pickle.loads(pickle.dumps(e.weight)),  # noqa: S301
    "module pickle": lambda e: pickle.loads(pickle.dumps(e)).weight,  # noqa: S301
    "save": lambda e: saved(e.weight),
    "save module": lambda e: saved(e).weight,
    "save state": lambda e: saved(e.state_dict())["weight"],
    "as strided": lambda e: e.weight.as_strided((ROWS, WIDTH), (WIDTH, 1)),
    "storage": lambda e: (
        torch.tensor(e.weight.untyped_storage().tolist(), dtype=torch.uint8)
        .view(torch.float32)
        .view(ROWS, WIDTH)
    ),
    "dlpack": lambda e: torch.from_dlpack(e.weight.detach()),
    "to": lambda e: e.weight.to(torch.float64),
    "out": lambda e: torch.add(e.weight.detach(), 0, out=torch.empty(ROWS, WIDTH)),
    "parameters": lambda e: next(e.parameters()).data,
}

# Functions that ask no parameter: they must find nothing at all.
PAST_THE_GUARD = {
    "tensor": torch.tensor,
    "as tensor": lambda w: torch.as_tensor(w).as_subclass(torch.Tensor),
    "asarray": lambda w: torch.asarray(w, requires_grad=False).as_subclass(torch.Tensor),
    "new tensor": lambda w: torch.empty(0).new_tensor(w),
    "set": lambda w: torch.empty(0).set_(w),
    "subclass": lambda w: w.as_subclass(torch.Tensor),
    "lazy clone": lambda w: w._lazy_clone().as_subclass(torch.Tensor),
    "disabled": lambda w: disabled(w),
}


def disabled(weight):
    with torch._C.DisableTorchFunctionSubclass():
        return weight.detach().clone()


@pytest.mark.filterwarnings("ignore:To copy construct")
@pytest.mark.parametrize("way", PAST_THE_GUARD)
def test_what_goes_past_the_guard_finds_nothing(way):
    layer = indebted()
    try:
        shown = PAST_THE_GUARD[way](layer.weight)
    except RuntimeError:
        return  # refusing is as good
    settled = layer.weight._memory.steps == 0
    assert settled or bool(torch.isnan(shown).all())


@pytest.mark.filterwarnings("ignore:.*__array")
@pytest.mark.parametrize("way", WAYS_OUT)
def test_every_way_out_settles(way):
    layer = indebted()
    shown = WAYS_OUT[way](layer)
    assert shown.shape == (ROWS, WIDTH)
    assert not isinstance(shown, LazyParameter)
    each = shown.detach().double().square().mean(1)
    assert bool(((each > VARIANCE / 2) & (each < VARIANCE * 2)).all()), each
    assert torch.equal(shown.detach().float(), layer.weight.detach())


@pytest.mark.parametrize("way", ["state", "data", "detach", "numpy", "view", "as strided"])
def test_what_was_shown_never_shows_later_debt(way):
    layer = indebted()
    shown = WAYS_OUT[way](layer)
    before = shown.detach().clone()
    layer.weight._memory.step(np.array([1]), np.full((1, WIDTH), 5, np.float32), VARIANCE)
    assert torch.equal(shown.detach(), before)


def test_norms_hashes_and_text_settle():
    assert indebted().weight.norm().item() > 50
    assert torch.linalg.vector_norm(indebted().weight).item() > 50
    assert "0., 0., 0." not in repr(indebted().weight)
    assert torch.nn.utils.parameters_to_vector(indebted().parameters()).norm() > 50


def test_a_lookup_settles_its_rows_alone():
    layer = indebted()
    layer(torch.tensor([[1, 1], [4, 1]]))
    assert layer.weight._memory.drawn == 2


@pytest.mark.parametrize("ask", ["shape", "dtype", "device", "grad", "requires_grad", "is_leaf"])
def test_what_tells_no_value_settles_nothing(ask):
    weight = indebted().weight
    getattr(weight, ask)
    len(weight)
    weight.numel()
    assert hash(weight)
    assert weight._memory.drawn == 0


def test_writes_settle_first_and_arrive():
    layer = indebted()
    with torch.no_grad():
        layer.weight.add_(100)
    assert layer.weight.mean().item() == pytest.approx(100, abs=1)
    assert layer.weight.std().item() == pytest.approx(3, abs=0.5)
    with torch.no_grad():
        layer.weight[2] = 7.0
    assert bool((layer.weight[2] == 7).all())
    layer = indebted()
    with torch.no_grad():
        layer.weight.mul_(0)
    assert not bool(layer.weight.any())
    layer.load_state_dict({"weight": torch.ones(ROWS, WIDTH)})
    assert isinstance(layer.weight, LazyParameter)
    assert bool((layer.weight == 1).all())


def test_other_optimisers_step_on_settled_values():
    layer = indebted()
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.1)
    layer.weight.grad = torch.ones(ROWS, WIDTH)
    optimizer.step()
    assert layer.weight.std().item() == pytest.approx(3, abs=0.5)


@pytest.mark.parametrize(
    "move",
    [
        lambda e: e.half(),
        lambda e: e.share_memory(),
        lambda e: setattr(e.weight, "data", torch.ones(ROWS, WIDTH)),
        lambda e: e.weight.resize_(2, 2),
    ],
)
def test_a_table_is_not_moved_away_from_its_noise(move):
    layer = indebted()
    with torch.no_grad(), pytest.raises(UsageError, match="close"):
        move(layer)


def test_gradients_are_taken_at_the_lookup():
    layer = indebted()
    found = layer(torch.tensor([1, 2]))
    assert found.requires_grad
    assert found.is_leaf
    found.sum().backward()
    assert layer.weight.grad is None
    with torch.no_grad():
        assert not layer(torch.tensor([1])).requires_grad
    layer.weight.requires_grad_(False)
    assert not layer(torch.tensor([1])).requires_grad


def test_made_plain_again_it_is_settled():
    layer = indebted()
    weight = layer.weight
    make_plain(weight)
    assert type(weight) is nn.Parameter
    assert layer.weight is weight
    assert weight.std().item() == pytest.approx(3, abs=0.5)
    make_plain(weight)


@pytest.mark.parametrize(
    ("weight", "match"),
    [
        (torch.zeros(3, 4, dtype=torch.float16), "float32 or float64"),
        (torch.zeros(3, 4, device="meta"), "main memory"),
        (torch.zeros(4), "main memory"),
    ],
)
def test_what_cannot_be_lazy_is_refused(weight, match):
    with pytest.raises(UsageError, match=match):
        make_lazy(nn.Parameter(weight))


def test_twice_lazy_is_refused():
    layer = indebted()
    with pytest.raises(UsageError, match="lazy already"):
        make_lazy(layer.weight)


@pytest.mark.parametrize("option", [{"max_norm": 1.0}, {"scale_grad_by_freq": True}])
def test_lookups_that_mix_examples_are_refused(option):
    layer = indebted(nn.Embedding(ROWS, WIDTH, **option))
    with pytest.raises(UsageError, match="leave them out"):
        layer(torch.tensor([1]))


def test_lookups_of_unknown_rows_are_refused():
    layer = indebted()
    with pytest.raises(UsageError, match="rows it reads"):
        torch.embedding(layer.weight, torch.tensor([1]))


@pytest.mark.parametrize("of", ["pretrained", "state"])
def test_views_from_before_see_neither_gradients_nor_debt(of):
    vectors = torch.zeros(ROWS, WIDTH)
    layer = nn.Embedding.from_pretrained(vectors, freeze=False)
    view = vectors if of == "pretrained" else layer.state_dict()["weight"]
    memory = make_lazy(layer.weight)
    memory.step(np.array([1]), np.ones((1, WIDTH), np.float32), VARIANCE)
    layer(torch.tensor([1]))
    assert not view.any()
    make_plain(layer.weight)
    assert not view.any()


def test_a_list_that_would_be_written_is_refused():
    layer = indebted()
    with torch.no_grad(), pytest.raises(UsageError, match="_foreach_mul_.*one parameter"):
        torch._foreach_mul_([layer.weight], 0.0)
    copies = [torch.zeros(ROWS, WIDTH)]
    torch._foreach_add_(copies, [layer.weight.detach()])
    assert copies[0].any()
