"""The example of private training: gradients of each sample are right, and the budget is kept."""

from types import ModuleType

import pytest
import torch
from test_examples import ROOT, example

pytest.importorskip("opacus", exc_type=ImportError)
pytest.importorskip("sklearn")
pytestmark = [
    pytest.mark.skipif(not (ROOT / "examples").is_dir(), reason="needs the source tree"),
    pytest.mark.filterwarnings("ignore"),  # opacus warns of its generator and of torch's hooks
]

from bigmodel_fast import ops  # noqa: E402


@pytest.fixture(scope="module")
def private() -> ModuleType:
    return example("private")


def test_gradients_of_each_sample_are_those_of_a_batch_of_one(private: ModuleType) -> None:
    """In float64, through all modules: Linear with an activation, norms with and without a residual, GatedMLP."""
    from opacus import GradSampleModule

    torch.manual_seed(0)
    model = private.Classifier(1, 8, 8, 10, features=16, layers=2).double()
    images, labels = torch.rand(5, 1, 8, 8, dtype=torch.float64), torch.arange(5)
    alone = []
    for image, label in zip(images, labels, strict=True):
        loss = ops.cross_entropy(model(image[None]), label[None])
        alone.append(torch.autograd.grad(loss, list(model.parameters())))
    wrapped = GradSampleModule(model)
    ops.cross_entropy(wrapped(images), labels).backward()
    for (name, p), *expected in zip(model.named_parameters(), *alone, strict=True):
        torch.testing.assert_close(p.grad_sample, torch.stack(expected), msg=lambda text, n=name: f"{n}: {text}")


def test_private_training_learns_and_keeps_its_budget(private: ModuleType) -> None:
    from opacus.optimizers import DPOptimizer

    torch.manual_seed(0)
    images, labels = private.digits("train")
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(images, labels), 256, shuffle=True)
    model = private.Classifier(1, 8, 8, 10, features=32, layers=1)
    optimizer = private.AdamW(model.parameters(), lr=1e-2)
    engine, model, optimizer, loader = private.make_private(
        model, optimizer, loader, epsilon=8.0, delta=1e-4, epochs=6, clip=1.0
    )
    assert isinstance(optimizer, DPOptimizer)
    assert optimizer.noise_multiplier > 0.3
    private.learn(model, loader, optimizer, 6)
    assert 7.0 < engine.get_epsilon(1e-4) <= 8.0
    assert private.accuracy(model, *private.digits("test")) > 0.4


def test_the_script_reports_what_was_spent(private: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    private.main(["--epochs", "1", "--batch", "512"])
    usual, spent = capsys.readouterr().out.splitlines()
    assert usual.startswith("privacy: none; test accuracy ")
    assert spent.startswith("privacy: epsilon ")
    assert " at delta 0.0001; test accuracy " in spent
