"""LazyDPSGD against per-example gradients written out, PyTorch's SGD, and Opacus."""

from __future__ import annotations

import collections
import copy
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import TensorDataset

from privrec.errors import UsageError
from privrec.optim.lazy_dpsgd import LazyDPSGD, PoissonSampler, poisson_loader
from privrec.optim.parameter import LazyParameter
from privrec.randomness import SecretRoot, SecureStream

VOCABULARY, TAGS, WIDTH = 7, 5, 3
pytestmark = pytest.mark.filterwarnings("ignore:Full backward hook is firing")


class Model(nn.Module):
    """Every kind of layer: a sequence of lookups, a bag, positions, normalisation."""

    def __init__(self, mode="mean", *, padding=None, offsets=True, last=False, norm=True):
        super().__init__()
        self.items = nn.Embedding(VOCABULARY, WIDTH, padding_idx=padding)
        self.tags = nn.EmbeddingBag(
            TAGS, WIDTH, mode=mode, padding_idx=padding, include_last_offset=last
        )
        self.each = nn.Linear(WIDTH, 4)
        self.norm = nn.LayerNorm(4) if norm else nn.Identity()
        self.out = nn.Linear(4 + WIDTH, 1, bias=False)
        self.offsets, self.last = offsets, last

    def forward(self, items, tags, weights=None):
        each = torch.tanh(self.norm(self.each(self.items(items)))).mean(1)
        if self.offsets:
            starts = torch.arange(len(tags) + self.last) * tags.shape[1]
            flat = () if weights is None else (weights.reshape(-1),)
            pooled = self.tags(tags.reshape(-1), starts, *flat)
        else:
            pooled = self.tags(tags, per_sample_weights=weights)
        return self.out(torch.cat([each, pooled], 1))[:, 0]


def batch(n, seed=0, length=4):
    rng = np.random.default_rng(seed)
    items = torch.from_numpy(rng.integers(0, VOCABULARY, (n, length)))
    tags = torch.from_numpy(rng.integers(0, TAGS, (n, 3)))
    return items, tags, torch.from_numpy(rng.normal(0, 3, n)).float()


def per_example(model, items, tags, target, weights=None):
    """The gradient of each example, by as many backward passes."""
    made = []
    for i in range(len(items)):
        model.zero_grad()
        own = None if weights is None else weights[i : i + 1]
        found = model(items[i : i + 1], tags[i : i + 1], own)
        ((found - target[i : i + 1]) ** 2).sum().backward()
        made.append([torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()])
    return made


def clipped_sum(gradients, bound):
    norms = [torch.sqrt(sum((g**2).sum() for g in each)) for each in gradients]
    factors = [min(1.0, bound / float(norm)) if norm else 1.0 for norm in norms]
    return [
        sum(f * each[k] for f, each in zip(factors, gradients, strict=True))
        for k in range(len(gradients[0]))
    ]


def made(model, **options):
    given = {"lr": 1.0, "noise_multiplier": 0.0, "max_grad_norm": 1.0, "expected_batch_size": 1}
    return LazyDPSGD(model, **{**given, **options})


def values(model):
    return [p.detach().clone() for p in model.parameters()]


@settings(deadline=None, max_examples=40)
@given(
    st.sampled_from(["mean", "sum", "weighted"]),
    st.sampled_from([None, 0]),
    st.booleans(),
    st.booleans(),
    st.sampled_from([0.05, 1.0, 100.0]),
    st.sampled_from(["mean", "sum"]),
    st.sampled_from([1, 4, 9]),
    st.integers(0, 1000),
)
def test_a_step_is_the_sum_of_clipped_gradients(
    mode, padding, offsets, last, bound, reduction, length, seed
):
    torch.manual_seed(seed)
    model = Model(
        "mean" if mode == "mean" else "sum", padding=padding, offsets=offsets, last=last and offsets
    )
    items, tags, target = batch(6, seed, length)
    weights = torch.rand(6, 3) + 0.1 if mode == "weighted" else None
    wanted = clipped_sum(per_example(model, items, tags, target, weights), bound)
    model.zero_grad()
    before = values(model)
    optimizer = made(model, max_grad_norm=bound, loss_reduction=reduction)
    loss = (model(items, tags, weights) - target) ** 2
    (loss.mean() if reduction == "mean" else loss.sum()).backward()
    optimizer.step()
    for was, now, step in zip(before, values(model), wanted, strict=True):
        torch.testing.assert_close(was - now, step, rtol=1e-3, atol=2e-5)


def test_wide_inputs_by_gradients_are_those_by_products():
    for positions in (3, 40):
        model = nn.Linear(5, 6)
        x, y = torch.randn(8, positions, 5), torch.randn(8, positions, 6)
        gradients = []
        for i in range(8):
            model.zero_grad()
            ((model(x[i]) - y[i]) ** 2).sum().backward()
            gradients.append([p.grad.clone() for p in model.parameters()])
        wanted, before = clipped_sum(gradients, 2.0), values(model)
        optimizer = made(model, max_grad_norm=2.0, loss_reduction="sum")
        ((model(x) - y) ** 2).sum().backward()
        optimizer.step()
        for was, now, step in zip(before, values(model), wanted, strict=True):
            torch.testing.assert_close(was - now, step, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("bound", [0.01, 0.5])
def test_one_example_moves_the_sum_by_at_most_the_bound(bound):
    torch.manual_seed(1)
    model = Model("sum")
    for seed in range(20):
        items, tags, target = batch(5, seed)
        moved = []
        for kept in (slice(0, 5), slice(1, 5)):
            copied = copy.deepcopy(model)
            optimizer = made(copied, max_grad_norm=bound, loss_reduction="sum")
            ((copied(items[kept], tags[kept]) - target[kept]) ** 2).sum().backward()
            optimizer.step()
            moved.append(torch.cat([v.reshape(-1) for v in values(copied)]))
        assert (moved[0] - moved[1]).norm().item() <= bound * (1 + 1e-5)


def test_a_long_gradient_is_clipped_below_the_bound_whatever_its_norm_is_rounded_to():
    """Norms are sums in float32, too small as often as too large: a margin pays for it."""
    torch.manual_seed(0)
    for _ in range(20):
        model = nn.Linear(1000, 1, bias=False)
        nn.init.zeros_(model.weight)  # so that weights are the step itself
        optimizer = LazyDPSGD(
            model, lr=1.0, noise_multiplier=0.0, max_grad_norm=0.7, expected_batch_size=1,
            loss_reduction="sum",
        )  # fmt: skip
        model(torch.randn(1, 1000) * 30).sum().backward()
        optimizer.step()
        assert 0.7 * (1 - 1e-4) < model.weight.detach().double().norm() <= 0.7


def without_clip_moves_more(bound=0.01):
    model = Model("sum")
    items, tags, target = batch(1)
    before = torch.cat([v.reshape(-1) for v in values(model)])
    optimizer = made(model, max_grad_norm=bound)
    ((model(items, tags) - target) ** 2).sum().backward()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("privrec.optim.lazy_dpsgd._SHORT", math.inf)
        optimizer.step()
    after = torch.cat([v.reshape(-1) for v in values(model)])
    return (before - after).norm().item() > bound


def test_the_test_of_the_bound_can_fail():
    torch.manual_seed(1)
    assert without_clip_moves_more()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"momentum": 0.9},
        {"weight_decay": 0.05},
        {"momentum": 0.8, "weight_decay": 0.02, "nesterov": True},
    ],
)
def test_without_noise_and_bound_it_is_sgd(options):
    torch.manual_seed(0)
    model = Model()
    peer = copy.deepcopy(model)
    lazy = made(model, lr=0.05, max_grad_norm=1e9, expected_batch_size=6, **options)
    plain = torch.optim.SGD(peer.parameters(), lr=0.05, **options)
    for step in range(12):
        items, tags, target = batch(6, step)
        for optimizer, each in ((lazy, model), (plain, peer)):
            optimizer.param_groups[0]["lr"] = 0.05 / (1 + step % 3)
            optimizer.zero_grad()
            functional.mse_loss(each(items, tags), target).backward()
            optimizer.step()
    for one, two in zip(values(model), values(peer), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)


@pytest.mark.statistical
@pytest.mark.parametrize("options", [{}, {"momentum": 0.9, "weight_decay": 0.1}])
def test_noise_has_the_scale_that_is_accounted_everywhere(options):
    model = nn.ModuleDict({"table": nn.Embedding(2000, 16), "dense": nn.Linear(200, 160)})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    root = SecretRoot.known(b"scale")
    optimizer = made(
        model, lr=0.5, noise_multiplier=3.0, max_grad_norm=2.0, expected_batch_size=4, root=root,
        **options,
    )  # fmt: skip
    for step in range(6):
        with torch.no_grad():
            model["table"](torch.arange(step * 10, step * 10 + 500))
        optimizer.step()
    scale = 3.0 * 2.0 / 4
    covariance = np.zeros((2, 2))
    mu, decay = options.get("momentum", 0), options.get("weight_decay", 0)
    A = np.array([[1 - 0.5 * decay, -0.5 * mu], [decay, mu]])
    b = np.array([-0.5, 1.0])
    for _ in range(6):
        covariance = A @ covariance @ A.T + scale**2 * np.outer(b, b)
    for parameter in model.parameters():
        if parameter.numel() > 1000:
            found = parameter.detach().double().square().mean().item() / covariance[0, 0]
            assert abs(found - 1) < 5 * np.sqrt(2 / parameter.numel())
            assert not abs(found * 4 / 9 - 1) < 0.3
            assert not abs(found * 9 / 4 - 1) < 0.3


def test_microbatches_are_one_batch():
    torch.manual_seed(0)
    model = Model()
    peer = copy.deepcopy(model)
    items, tags, target = batch(6)
    one, two = (made(each, loss_reduction="sum") for each in (model, peer))
    ((model(items, tags) - target) ** 2).sum().backward()
    one.step()
    for part in (slice(0, 2), slice(2, 6)):
        ((peer(items[part], tags[part]) - target[part]) ** 2).sum().backward()
        two.accumulate()
    two.step()
    for a, b in zip(values(model), values(peer), strict=True):
        torch.testing.assert_close(a, b)


def test_two_passes_without_accumulate_are_refused():
    model = Model()
    optimizer = made(model)
    items, tags, target = batch(4)
    for _ in range(2):
        functional.mse_loss(model(items, tags), target).backward()
    with pytest.raises(UsageError, match="accumulate"):
        optimizer.step()


def test_an_empty_batch_is_noise_alone():
    model = Model()
    optimizer = made(model, noise_multiplier=1.0)
    before = values(model)
    items, tags, target = batch(0)
    functional.mse_loss(model(items, tags), target, reduction="sum").backward()
    optimizer.step()
    optimizer.step()
    for was, now in zip(before, values(model), strict=True):
        assert torch.isfinite(now).all()
        assert not torch.any(was == now)


def test_what_is_not_a_number_counts_as_no_example():
    torch.manual_seed(0)
    model = Model(norm=False)
    peer = copy.deepcopy(model)
    items, tags, target = batch(4)
    one, two = (made(each, loss_reduction="sum") for each in (model, peer))
    broken = target.clone()
    broken[2] = float("nan")
    ((model(items, tags) - broken) ** 2).sum().backward()
    one.step()
    kept = torch.tensor([0, 1, 3])
    ((peer(items[kept], tags[kept]) - target[kept]) ** 2).sum().backward()
    two.step()
    for a, b in zip(values(model), values(peer), strict=True):
        torch.testing.assert_close(a, b)


def test_state_goes_round_trip():
    torch.manual_seed(0)
    model = Model()
    options = {"momentum": 0.9, "lr": 0.1, "max_grad_norm": 5.0}
    one = made(model, **options)

    def train(each, optimizer, seed):
        items, tags, target = batch(5, seed)
        functional.mse_loss(each(items, tags), target).backward()
        optimizer.step()

    train(model, one, 0)
    state, weights = copy.deepcopy((one.state_dict(), model.state_dict()))
    assert set(state["state"]) == set(range(len(list(model.parameters()))))
    other = Model()
    two = made(other, **options)
    other.load_state_dict(weights)
    two.load_state_dict(state)
    for each, optimizer in ((model, one), (other, two)):
        train(each, optimizer, 1)
    for a, b in zip(values(model), values(other), strict=True):
        torch.testing.assert_close(a, b)


def test_closed_it_leaves_an_ordinary_model():
    model = Model()
    optimizer = made(model, noise_multiplier=1.0)
    optimizer.step()
    assert isinstance(model.items.weight, LazyParameter)
    before = values(model)
    optimizer.close()
    assert type(model.items.weight) is nn.Parameter
    for was, now in zip(before, values(model), strict=True):
        assert torch.equal(was, now)
    functional.mse_loss(model(*batch(2)[:2]), torch.ones(2)).backward()
    assert model.items.weight.grad is not None
    made(model).step()


class Largest(TorchDispatchMode):
    """The largest tensor that any operation makes."""

    def __init__(self, table):
        super().__init__()
        self.numbers, self.table = 0, table

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for each in out if isinstance(out, tuple) else (out,):
            if isinstance(each, torch.Tensor):
                storage = each.untyped_storage().nbytes() // each.element_size()
                if each.untyped_storage().data_ptr() != self.table:  # made in place
                    self.numbers = max(self.numbers, storage)
        return out


def test_memory_does_not_grow_with_the_vocabulary():
    model = nn.Sequential(nn.EmbeddingBag(200_000, 8, mode="sum"), nn.Linear(8, 1))
    optimizer = made(model, noise_multiplier=1.0)
    with Largest(model[0].weight._raw.untyped_storage().data_ptr()) as seen:
        for _ in range(3):
            rows = torch.randint(0, 200_000, (64, 10))
            model(rows).square().mean().backward()
            optimizer.step()
    assert seen.numbers <= 3 * 2**15  # buffers of the noise; the table has 1.6 million


def test_a_gradient_by_another_way_is_refused():
    model = Model()
    optimizer = made(model)
    items, tags, target = batch(3)
    loss = functional.mse_loss(model(items, tags), target) + model.items.weight.square().sum()
    loss.backward()
    with pytest.raises(UsageError, match="another way"):
        optimizer.step()
    assert model.items.weight.grad is None


class Owner(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(3))


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Embedding(4, 4), nn.Linear(4, 4, bias=False)
        self.two.weight = self.one.weight


class AdaClipDPOptimizer:
    original_optimizer = None


LINEAR = nn.Linear(2, 2)


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: made(LINEAR, noise_multiplier=-1.0), "noise_multiplier"),
        (lambda: made(LINEAR, max_grad_norm=0.0), "max_grad_norm"),
        (lambda: made(LINEAR, expected_batch_size=None), "expected_batch_size"),
        (lambda: made(LINEAR, loss_reduction="max"), "loss_reduction"),
        (lambda: made(Owner()), "register_grad_sampler"),
        (lambda: made(Tied()), "share a parameter"),
        (lambda: made(nn.EmbeddingBag(3, 2, mode="max")), "not clipped"),
        (lambda: made(LINEAR, params=[LINEAR.weight]), "all trainable"),
        (
            lambda: LazyDPSGD.replacing(torch.optim.Adam(LINEAR.parameters()), LINEAR),
            "use torch.optim.SGD",
        ),
        (lambda: LazyDPSGD.replacing(AdaClipDPOptimizer(), LINEAR), "does not adapt"),
        (
            lambda: LazyDPSGD.replacing(
                torch.optim.SGD(LINEAR.parameters(), lr=0.1, momentum=0.1, dampening=0.1), LINEAR
            ),
            "dampening",
        ),
    ],
)
def test_what_cannot_be_done_is_refused(call, match):
    with pytest.raises(UsageError, match=match):
        call()


def test_a_layer_outside_of_its_model_is_refused():
    model = Model()
    made(model)
    with pytest.raises(UsageError, match="call the model"):
        model.each(torch.randn(2, 3))


class TestOpacus:
    """Accountants, wrapped models, virtual batches, and the same step."""

    def test_the_same_step_as_opacus(self):
        from opacus import GradSampleModule
        from opacus.optimizers import DPOptimizer

        torch.manual_seed(0)
        model = Model("sum")
        wrapped = GradSampleModule(copy.deepcopy(model))
        sgd = torch.optim.SGD(wrapped.parameters(), lr=0.3, momentum=0.5)
        peer = DPOptimizer(sgd, noise_multiplier=0.0, max_grad_norm=0.7, expected_batch_size=6)
        inner = torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.5)
        lazy = LazyDPSGD.replacing(
            DPOptimizer(inner, noise_multiplier=0.0, max_grad_norm=0.7, expected_batch_size=6),
            model,
        )
        assert lazy.max_grad_norm == 0.7
        for step in range(4):
            items, tags, target = batch(6, step)
            # Opacus counts a row once that a bag holds twice, so that no bag does here.
            tags = (tags[:, :1] + torch.arange(3)) % TAGS
            for optimizer, each in ((peer, wrapped), (lazy, model)):
                optimizer.zero_grad()
                functional.mse_loss(each(items, tags), target).backward()
                optimizer.step()
        for a, b in zip(values(model), values(wrapped), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)

    def test_a_wrapped_model_makes_no_gradients_of_each_example(self):
        from opacus import GradSampleModule

        wrapped = GradSampleModule(Model())
        optimizer = made(wrapped)
        items, tags, target = batch(4)
        before = values(wrapped)
        functional.mse_loss(wrapped(items, tags), target).backward()
        optimizer.step()
        assert all(getattr(p, "grad_sample", None) is None for p in wrapped.parameters())
        assert any(not torch.equal(a, b) for a, b in zip(before, values(wrapped), strict=True))

    def test_accountants_attach(self):
        from opacus.accountants import RDPAccountant

        accountant = RDPAccountant()
        optimizer = made(Model(), noise_multiplier=1.3)
        optimizer.attach_step_hook(accountant.get_optimizer_hook_fn(sample_rate=0.1))
        for _ in range(3):
            optimizer.step()
        assert accountant.history == [(1.3, 0.1, 3)]

    def test_virtual_batches(self):
        from opacus.utils.batch_memory_manager import BatchMemoryManager

        torch.manual_seed(0)
        items, tags, target = batch(8)
        data = TensorDataset(items, tags, target)
        loader = torch.utils.data.DataLoader(data, batch_sampler=[list(range(8))])
        model = Model()
        peer = copy.deepcopy(model)
        one, two = (made(each, loss_reduction="sum") for each in (model, peer))
        with BatchMemoryManager(
            data_loader=loader, max_physical_batch_size=3, optimizer=one
        ) as parts:
            for a, b, y in parts:
                one.zero_grad()
                ((model(a, b) - y) ** 2).sum().backward()
                one.step()
        ((peer(items, tags) - target) ** 2).sum().backward()
        two.step()
        for a, b in zip(values(model), values(peer), strict=True):
            torch.testing.assert_close(a, b)


Pair = collections.namedtuple("Pair", "x y")
EXAMPLES = {
    "text": lambda i: (torch.tensor([i]), f"user-{i}"),
    "bytes": lambda i: b"user",
    "named": lambda i: Pair(torch.ones(2, 3), i),
    "mapping": lambda i: collections.UserDict(x=torch.tensor([i])),
    "ordered": lambda i: collections.OrderedDict(x=1.5, y=True),
    "nested": lambda i: {"a": Pair([np.ones((2, 2)), "b"], (np.float32(i), ["c", "d"]))},
}


class Examples(torch.utils.data.Dataset):
    def __init__(self, make):
        self.make = make

    def __len__(self):
        return 3

    def __getitem__(self, i):
        return self.make(i)


def shape_of(batch):
    """Types, keys and dtypes, whatever the number of examples."""
    if isinstance(batch, torch.Tensor):
        return batch.dtype, batch.shape[1:]
    if isinstance(batch, collections.abc.Mapping):
        return type(batch), {key: shape_of(value) for key, value in batch.items()}
    is_texts = all(isinstance(each, str | bytes) for each in batch)
    return type(batch), [] if is_texts else [shape_of(each) for each in batch]


class TestPoisson:
    def test_batches_have_the_rate_and_repeat_for_a_root(self):
        root = SecretRoot.known(b"poisson")
        batches = list(PoissonSampler(1000, 0.05, 200, root))
        sizes = [len(each) for each in batches]
        assert len(batches) == 200
        assert abs(np.mean(sizes) - 50) < 3
        assert abs(np.var(sizes) - 47.5) < 20
        assert batches == list(PoissonSampler(1000, 0.05, 200, SecretRoot.known(b"poisson")))
        assert list(PoissonSampler(1000, 0.05, 3)) != list(PoissonSampler(1000, 0.05, 3))
        assert [len(b) for b in PoissonSampler(10, 1.0, 2, root)] == [10, 10]

    def test_a_coin_below_the_rate_is_in(self, monkeypatch):
        coins = np.array([0, 2**31 - 1, 2**31, 2**32 - 1], np.uint32)
        monkeypatch.setattr(SecureStream, "uint32", lambda stream, size: coins[:size])
        assert list(PoissonSampler(4, 0.5, 1)) == [[0, 1]]

    def test_empty_batches_keep_their_shape(self):
        data = TensorDataset(torch.ones(3, 4), torch.ones(3, dtype=torch.int64))
        for x, y in poisson_loader(data, 1e-9, 5):
            assert x.shape == (0, 4)
            assert y.shape == (0,)
            assert y.dtype == torch.int64

    @pytest.mark.parametrize("kind", EXAMPLES)
    def test_an_empty_batch_has_the_structure_of_a_full_one(self, kind):
        data = Examples(EXAMPLES[kind])
        (full,), (empty,) = (list(poisson_loader(data, rate, 1)) for rate in (1.0, 1e-9))
        assert shape_of(full) == shape_of(empty)

    @pytest.mark.parametrize(
        "data", [[None], [{"x": object()}], [torch.ones(2).to_sparse()], iter([1])]
    )
    def test_what_cannot_be_a_batch_is_refused_before_the_first_one(self, data):
        with pytest.raises(UsageError, match="cannot be put into a batch|has a coin of its own"):
            poisson_loader(data, 0.1, 1)

    @pytest.mark.parametrize("bad", [(0, 0.1, 1), (1, 0.0, 1), (1, 1.1, 1), (1, 0.1, 0)])
    def test_what_cannot_be_drawn_is_refused(self, bad):
        with pytest.raises(UsageError, match="Poisson"):
            PoissonSampler(*bad)
