"""MLP and MLPTrainer: the eager loop's trajectory step by step, states that go both ways, errors, Ctrl-C."""

import copy
import signal
import threading

import numerics
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bigmodel_fast as bmf
from bigmodel_fast import _C, optim
from bigmodel_fast.data import ArrayLoader, Augment
from bigmodel_fast.models import MLP
from bigmodel_fast.models.mlp import ACTIVATIONS, ReLU2, dense_layers
from bigmodel_fast.train import MLPTrainer

SGD, ADAM, ADAMW = torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW
OPTIMIZERS = [
    (SGD, {"lr": 0.1}),
    (SGD, {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01}),
    (SGD, {"lr": 0.05, "momentum": 0.9, "nesterov": True}),
    (SGD, {"lr": 0.05, "momentum": 0.8, "dampening": 0.3}),
    (ADAM, {"lr": 0.01, "weight_decay": 0.1}),
    (ADAMW, {"lr": 0.01, "betas": (0.8, 0.95)}),
    (optim.AdamW, {"lr": 0.01}),
]
EPOCHS, N, FEATURES, CLASSES, BATCH = 2, 50, 21, 5, 16


def data(loss: str, seed: int = 0) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    x = torch.randint(256, (N, FEATURES), generator=draw, dtype=torch.uint8)
    if loss == "mse":
        return x, torch.randn(N, CLASSES, generator=draw)
    return x, torch.randint(CLASSES, (N,), generator=draw)


def network(activation: str = "relu", **how) -> MLP:
    torch.manual_seed(1)
    return MLP([FEATURES, 19, 33, CLASSES], activation=activation, **how)


def eager(model: MLP, make, x: Tensor, y: Tensor, loss: str, order: Tensor, dtype: torch.dtype) -> list[dict]:
    """The parameters after each step of the loop people write, in the model's dtype."""
    plain = nn.Sequential(*copy.deepcopy(model)).to(dtype)
    optimizer, seen = make(plain.parameters()), []
    inputs = (x.to(dtype) / 255 - 0.5) / 0.5
    for picked in order.split(BATCH):
        optimizer.zero_grad()
        criterion = F.mse_loss if loss == "mse" else F.cross_entropy
        criterion(plain(inputs[picked]), y[picked].to(dtype) if loss == "mse" else y[picked]).backward()
        optimizer.step()
        seen.append({name: p.detach().clone() for name, p in plain.state_dict().items()})
    return seen


def check_trajectory(model: MLP, make, loss: str) -> None:
    """Every step's parameters are as near to float64's as eager's are."""
    x, y = data(loss)
    order = torch.cat([torch.randperm(N, generator=torch.Generator().manual_seed(e)) for e in range(EPOCHS)])
    exact, plain = (eager(model, make, x, y, loss, order, d) for d in (torch.float64, torch.float32))
    trainer = MLPTrainer(model, loss, make(model.parameters()))
    loader = ArrayLoader(x, y, batch_size=BATCH, mean=0.5, std=0.5)
    for step, picked in enumerate(order.split(BATCH)):
        trainer.epoch(loader, order=picked)
        for name, p in model.state_dict().items():
            # Later steps start from what was rounded: the largest weight is what the error is held against.
            scale = max(1.0, numerics.largest(exact[step][name]))
            numerics.assert_close(
                p, plain[step][name], exact[step][name], numerics.BACKWARD, f"step {step}, {name}", scale
            )


@pytest.fixture(params=_C.supported_cpu_isas())
def isa(request):
    _C.set_cpu_isa(request.param)


@pytest.mark.parametrize("loss", ["cross_entropy", "mse"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_steps_are_eagers_for_every_activation(activation: str, loss: str, isa) -> None:
    check_trajectory(network(activation), lambda ps: SGD(ps, lr=0.1), loss)


@pytest.mark.parametrize(("kind", "options"), OPTIMIZERS)
def test_steps_are_eagers_for_every_optimizer(kind, options: dict, isa) -> None:
    check_trajectory(network("gelu", bias=[True, False, True]), lambda ps: kind(ps, **options), "cross_entropy")


def test_an_epoch_is_its_steps_and_does_not_depend_on_threads() -> None:
    x, y = data("cross_entropy")
    found = []
    for threads, parts in ((1, 1), (2, 1), (3, 4)):
        torch.set_num_threads(threads)
        model = network(dropout=0.3 if parts == 1 else 0.0).train(parts == 1)
        trainer = MLPTrainer(model, optimizer=ADAMW(model.parameters(), lr=0.01))
        torch.manual_seed(3)
        loader = ArrayLoader(x, y, batch_size=BATCH, shuffle=True)
        result = trainer.epoch(loader)
        assert (result.steps, result.total) == (4, 4)
        found.append([p.detach().clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(found[0], found[1], strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(found[0], found[2], strict=True))  # dropout does something


def test_bf16_learns_as_fp32_does() -> None:
    x, y = data("cross_entropy")
    losses = {}
    for dtype in ("fp32", "bf16"):
        model = network("silu")
        trainer = MLPTrainer(model, optimizer=ADAMW(model.parameters(), lr=0.01), dtype=dtype)
        loader = ArrayLoader(x, y, batch_size=BATCH)
        losses[dtype] = [trainer.epoch(loader).loss for _ in range(8)]
    assert losses["fp32"][-1] < 0.9 * losses["fp32"][0]
    assert losses["bf16"] == pytest.approx(losses["fp32"], rel=0.01)
    if bmf.cpu_isa() == "avx512_bf16":
        assert losses["bf16"] != losses["fp32"]


def test_the_loss_and_the_accuracy_are_those_of_the_batches() -> None:
    x, y = data("cross_entropy")
    model = network()
    with torch.no_grad():
        logits = model((x.float() / 255 - 0.5) / 0.5)
    trainer = MLPTrainer(model, optimizer=SGD(model.parameters(), lr=0.0))
    result = trainer.epoch(ArrayLoader(x, y, batch_size=BATCH, mean=0.5, std=0.5))
    assert result.loss == pytest.approx(F.cross_entropy(logits, y).item(), rel=1e-5)
    assert result.accuracy == pytest.approx((logits.argmax(1) == y).float().mean().item())
    assert trainer.step(x, y) == pytest.approx(F.cross_entropy(model(x.float() / 255), y).item(), rel=1e-5)


@pytest.mark.parametrize(("kind", "options"), [OPTIMIZERS[1], OPTIMIZERS[5]])
def test_training_goes_on_in_torch_and_comes_back(kind, options: dict) -> None:
    x, y = data("cross_entropy")
    inputs, order = x.float() / 255, torch.arange(BATCH)
    models = [network("tanh") for _ in range(2)]
    optimizers = [kind(m.parameters(), **options) for m in models]
    trainer = MLPTrainer(models[0], optimizer=optimizers[0])
    loader = ArrayLoader(x, y, batch_size=BATCH)
    for turn in ("native", "torch", "native"):
        for i, (model, optimizer) in enumerate(zip(models, optimizers, strict=True)):
            if turn == "native" and i == 0:
                trainer.epoch(loader, order=order)
                continue
            optimizer.zero_grad()
            F.cross_entropy(model(inputs[order]), y[order]).backward()
            optimizer.step()
    states = [o.state_dict() for o in optimizers]
    assert states[0]["state"].keys() == states[1]["state"].keys()
    for a, b in zip(states[0]["state"].values(), states[1]["state"].values(), strict=True):
        assert a.keys() == b.keys()
        for name in a:
            torch.testing.assert_close(a[name], b[name], rtol=1e-4, atol=1e-6)
    for p, q in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-6)


def test_a_schedulers_steps_are_its_own() -> None:
    x, y = data("cross_entropy")
    results = []
    for native in (True, False):
        model = network()
        optimizer = SGD(model.parameters(), lr=0.1, momentum=0.9)
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.5, total_steps=9)
        if native:
            trainer = MLPTrainer(model, optimizer=optimizer)
            for _ in range(2):
                trainer.epoch(ArrayLoader(x, y, batch_size=BATCH), scheduler=scheduler)
        else:
            for picked in [*torch.arange(N).split(BATCH)] * 2:
                optimizer.zero_grad()
                F.cross_entropy(model(x[picked].float() / 255), y[picked]).backward()
                optimizer.step()
                scheduler.step()
        results.append((scheduler.last_epoch, optimizer.param_groups[0]["lr"], list(model.parameters())))
    assert results[0][:2] == results[1][:2]
    for p, q in zip(results[0][2], results[1][2], strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)


def test_frozen_parameters_stay_and_autograd_hears_of_the_others() -> None:
    x, y = data("cross_entropy")
    model = network()
    model[0].weight.requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    frozen, free = [model[0].weight], [model[4].weight]  # held by the optimizer; the others are not
    optimizer = SGD([{"params": frozen + free}, {"params": [model[2].bias], "lr": 0.5}], lr=0.1)
    versions = {name: p._version for name, p in model.named_parameters()}
    MLPTrainer(model, optimizer=optimizer).epoch(ArrayLoader(x, y))
    changed = {name for name, p in model.state_dict().items() if not torch.equal(p, before[name])}
    assert changed == {"4.weight", "2.bias"} == {n for n, p in model.named_parameters() if p._version > versions[n]}


def test_dropout_keeps_its_share_and_backward_sees_the_same_choices() -> None:
    n, share = 4000, 0.25
    model = MLP([1, 64, 1], activation="relu", dropout=share, bias=[True, False])
    for p in model.parameters():
        nn.init.ones_(p)
    model[3].weight.requires_grad_(False)  # so that the hidden bias is all that is learned
    optimizer = SGD([model[0].bias], lr=1.0)
    trainer = MLPTrainer(model, "mse", optimizer)
    loader = ArrayLoader(torch.ones(n, 1), torch.zeros(n, 1), batch_size=n)
    loss = trainer.epoch(loader).loss
    # y = 2 sum(kept / (1 - share)) over 64 units: mean 128, variance 64 * 4 share / (1 - share).
    expected = 128.0**2 + 64 * 4 * share / (1 - share)
    assert loss == pytest.approx(expected, rel=0.005)
    # d loss / d b_j = mean of 2 y kept_j / (1 - share) = 2 (128 + 2 share / (1 - share)).
    moved = 1 - model[0].bias.detach()
    assert moved.mean().item() == pytest.approx(2 * (128 + 2 * share / (1 - share)), rel=0.01)
    assert 0 < moved.std().item() < 0.1 * moved.mean().item()
    again = MLPTrainer(model.eval(), "mse", optimizer)
    nn.init.ones_(model[0].bias)
    assert again.epoch(loader).loss == pytest.approx(128.0**2)


def test_a_plain_sequential_trains_as_well_and_state_dicts_go_both_ways() -> None:
    plain = nn.Sequential(
        nn.Flatten(), nn.Sequential(nn.Linear(FEATURES, 19), nn.GELU("tanh")), nn.Dropout(0.1), nn.Linear(19, 3)
    )
    layers = dense_layers(plain)
    assert [(a.name, a.activation, a.dropout is not None) for a in layers] == [
        ("1.0", "gelu_tanh", True),
        ("3", None, False),
    ]
    mine = MLP([FEATURES, 19, 3], activation="gelu_tanh", dropout=0.1)
    twin = nn.Sequential(nn.Linear(FEATURES, 19), nn.GELU("tanh"), nn.Dropout(0.1), nn.Linear(19, 3))
    assert list(mine.state_dict()) == list(twin.state_dict()) == ["0.weight", "0.bias", "3.weight", "3.bias"]
    mine.load_state_dict(twin.state_dict())
    x = torch.randn(7, FEATURES)
    torch.testing.assert_close(mine.eval()(x), twin.eval()(x), rtol=1e-5, atol=1e-6)
    MLPTrainer(plain, optimizer=SGD(plain.parameters(), lr=0.1)).step(torch.rand(8, FEATURES), torch.arange(8) % 3)


def test_an_mlp_trains_in_an_ordinary_loop() -> None:
    x, y = torch.randn(6, 3, 7), torch.randint(CLASSES, (6,))
    model = network("relu2")
    twin = nn.Sequential(*copy.deepcopy(model))
    assert isinstance(twin[1], ReLU2)
    for m, inputs in ((model, x), (twin, x.flatten(1))):
        F.cross_entropy(m(inputs), y).backward()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-6)


def test_distortions_differ_by_sample_and_epoch_and_keep_to_the_seed() -> None:
    x = torch.zeros(8, 1, 9, 9)
    x[:, :, 3:6, 3:6] = 1
    y = torch.zeros(8, dtype=torch.int64)
    loader = ArrayLoader(x, y, batch_size=8, augment=Augment(shift=2, rotate=30, scale=0.2, elastic=1))
    torch.manual_seed(0)
    first, second = (next(iter(loader))[0] for _ in range(2))
    torch.manual_seed(0)
    assert torch.equal(next(iter(loader))[0], first)
    assert not torch.equal(first, second)
    assert not torch.equal(first[0], first[1])
    assert first.min() >= 0
    assert first.max() <= 1
    assert first.sum((1, 2, 3)).mean().item() == pytest.approx(9, rel=0.25)


@pytest.mark.parametrize(
    ("augment", "limit"),
    [(Augment(shift=2), 2), (Augment(rotate=90), 3), (Augment(scale=0.5), 1), (Augment(elastic=0.5), 2)],
)
def test_each_distortion_moves_a_point_no_further_than_it_says(augment: Augment, limit: float) -> None:
    n = 200
    x = torch.zeros(n, 1, 21, 21)
    x[:, :, 10, 12] = 1  # two pixels right of the centre
    loader = ArrayLoader(x, torch.zeros(n, dtype=torch.int64), batch_size=n, augment=augment)
    torch.manual_seed(0)
    seen = next(iter(loader))[0][:, 0]
    rows, columns = torch.meshgrid(torch.arange(21.0), torch.arange(21.0), indexing="ij")
    mass = seen.sum((1, 2))
    moved = torch.stack([(seen * rows).sum((1, 2)) / mass - 10, (seen * columns).sum((1, 2)) / mass - 12], 1)
    assert moved.abs().max().item() <= limit + 0.5
    assert moved.std(0).max().item() > 0.1
    if augment.rotate:  # around the centre, in both directions
        assert (moved + torch.tensor([0.0, 2.0])).norm(dim=1).mean().item() == pytest.approx(2, abs=0.2)
        assert moved[:, 0].min().item() < -1 < 1 < moved[:, 0].max().item()


def test_loaders_shuffle_as_a_dataloader_does() -> None:
    x, y = torch.arange(40.0)[:, None], torch.arange(40)
    theirs = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=16, shuffle=True)
    mine = ArrayLoader(x, y, batch_size=16, shuffle=True)
    for loader in (theirs, mine):
        torch.manual_seed(5)
        loader.seen = [(a.clone(), b.clone()) for _ in range(2) for a, b in loader]
    for (a, b), (c, d) in zip(theirs.seen, mine.seen, strict=True):
        assert torch.equal(a, c)
        assert torch.equal(b, d)


def test_ctrl_c_ends_an_epoch_between_two_steps() -> None:
    x, y = torch.randint(256, (4000, 784), dtype=torch.uint8), torch.randint(10, (4000,))
    model = MLP([784, 64, 10])
    optimizer = ADAMW(model.parameters(), lr=1e-3)
    trainer = MLPTrainer(model, optimizer=optimizer)
    order = torch.randint(4000, (2_000_000,))  # half a minute
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
    try:
        threading.Timer(0.3, signal.raise_signal, (signal.SIGINT,)).start()
        with pytest.raises(KeyboardInterrupt):
            trainer.epoch(ArrayLoader(x, y), order=order)
    finally:
        signal.signal(signal.SIGINT, before)
    assert 0 < int(optimizer.state[model[0].weight]["step"]) < len(order) // 64
    assert all(p.isfinite().all() for p in model.parameters())


def test_progress_is_told_until_the_end() -> None:
    x, y = data("cross_entropy")
    model, told = network(), []
    trainer = MLPTrainer(model, optimizer=SGD(model.parameters(), lr=0.1))
    result = trainer.epoch(ArrayLoader(x, y, batch_size=BATCH), progress=told.append)
    assert told[-1] == result
    assert result.steps == result.total == 4


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda m, o: MLPTrainer(m, "l1", o), ValueError, "loss must be one of cross_entropy, mse, got 'l1'"),
        (lambda m, o: MLPTrainer(m, optimizer=o, dtype="fp8"), ValueError, "dtype must be one of fp32, bf16"),
        (lambda m, o: MLPTrainer(m), TypeError, "optimizer must be a torch.optim.SGD, Adam or AdamW, got none"),
        (lambda m, o: MLPTrainer(nn.Linear(1, 1), optimizer=o), ValueError, "the optimizer holds no parameter"),
        (lambda m, o: MLPTrainer(nn.Conv2d(1, 1, 1), optimizer=o), ValueError, "begins with a Linear, got Conv2d"),
        (
            lambda m, o: MLPTrainer(nn.Sequential(m, nn.LayerNorm(CLASSES)), optimizer=o),
            ValueError,
            "made of Linear, activations and Dropout, got LayerNorm at 1",
        ),
        (
            lambda m, o: MLPTrainer(nn.Sequential(m, nn.Linear(9, 2)), optimizer=o),
            ValueError,
            "layer 1 takes 9 features, but 0.4 gives 5",
        ),
        (
            lambda m, o: MLPTrainer(m, optimizer=SGD(m.parameters(), lr=0.1, maximize=True)),
            ValueError,
            "option maximize is not supported",
        ),
    ],
)
def test_what_it_cannot_train_is_told_in_one_line(make, error: type, words: str) -> None:
    model = network()
    with pytest.raises(error, match=words) as caught:
        make(model, SGD(model.parameters(), lr=0.1))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("x", "y", "error", "words"),
    [
        (torch.zeros(3, 7), torch.zeros(3).long(), ValueError, "samples have 7 features, the model takes 21"),
        (
            torch.zeros(3, 21),
            torch.tensor([0, 5, 1]),
            IndexError,
            "label 5 of sample 1 is out of range for a model of 5",
        ),
        (torch.zeros(3, 21), torch.zeros(3), TypeError, "cross_entropy needs targets"),
    ],
)
def test_data_that_does_not_fit_is_told_in_one_line(x: Tensor, y: Tensor, error: type, words: str) -> None:
    model = network()
    with pytest.raises(error, match=words):
        MLPTrainer(model, optimizer=SGD(model.parameters(), lr=0.1)).epoch(ArrayLoader(x, y))
    double = network().double()
    with pytest.raises(TypeError, match=r"0\.weight must be contiguous float32 on the CPU, got torch\.float64"):
        MLPTrainer(double, optimizer=SGD(double.parameters(), lr=0.1)).step(*data("cross_entropy"))
    elsewhere = network().to("meta")
    with pytest.raises(TypeError, match=r"trains on the CPU, but 0\.weight is on meta"):
        MLPTrainer(elsewhere, optimizer=SGD(elsewhere.parameters(), lr=0.1))
    with pytest.raises(IndexError, match=r"order must hold samples in \[0, 50\), got 50"):
        MLPTrainer(model, optimizer=SGD(model.parameters(), lr=0.1)).epoch(
            ArrayLoader(*data("cross_entropy")), order=torch.tensor([50])
        )


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (([3],), "sizes must be two or more positive integers"),
        (([3, 4, 2], "swish"), "activation must be one of relu, sigmoid, .* got 'swish'"),
        (([3, 4, 2], ["relu", "tanh"]), "activation must be one value or 1, got 2"),
        (([3, 4, 2], "relu", True, 1.0), r"dropout must lie in \[0, 1\), got 1.0"),
    ],
)
def test_mlp_names_what_is_wrong_with_its_arguments(arguments: tuple, words: str) -> None:
    named = dict(zip(("activation", "bias", "dropout"), arguments[1:], strict=False))
    with pytest.raises(ValueError, match=words):
        MLP(arguments[0], **named)
