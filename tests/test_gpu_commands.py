"""finetune, evaluate and train-image as a GPU would have them, as far as that shows without one: batches are copied
ahead, a step is launched as a whole before anything waits for it, all of it lies on the device; and what is refused.
"""

import functools
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_models import PACKAGES, labelled_code, phrases, questions, tagged_code, tiny_bart, tiny_bert, write_lines
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

for package in PACKAGES:
    pytest.importorskip(package)

from bigmodel_fast.benchmarks import gpu_commands, gpu_worker  # noqa: E402

import bigmodel_fast as bmf  # noqa: E402
from bigmodel_fast.cli import main  # noqa: E402
from bigmodel_fast.optim import AdamW  # noqa: E402
from bigmodel_fast.train import ConfigError, TrainError, images, pretrained, setup  # noqa: E402
from bigmodel_fast.train import finetuning as tuning  # noqa: E402
from bigmodel_fast.train.evaluation import EvaluateConfig, evaluate  # noqa: E402
from bigmodel_fast.train.finetune_config import FinetuneConfig  # noqa: E402
from bigmodel_fast.train.finetuning import Finetuner  # noqa: E402
from bigmodel_fast.train.image_config import ImageTrainConfig, ViTShape  # noqa: E402
from bigmodel_fast.train.images import ImageTrainer  # noqa: E402

CUDA = torch.device("cuda")
no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")


@pytest.fixture(scope="module")
def snippets(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str, str]:
    return labelled_code(tmp_path_factory.mktemp("snippets"))


def tuner(model: str, data: str, out: Path, optim: dict[str, Any] | None = None, **how: Any) -> Finetuner:
    optim = {"lr": 1e-2, "batch": 4, "accumulation": 2, **(optim or {})}
    how = {"max_length": 24, "steps": 6, **how}
    return Finetuner(FinetuneConfig.from_dict({"model": model, "data": data, "out": str(out), "optim": optim, **how}))


def image_trainer(out: Path, **how: Any) -> ImageTrainer:
    how = {"model": "vit", "vit": ViTShape(layers=1, width=48, dropout=0.1), "epochs": 1, **how}
    return ImageTrainer(ImageTrainConfig(out=str(out), **how))


def assert_same_weights(one: nn.Module, other: nn.Module) -> None:
    for (name, a), b in zip(one.state_dict().items(), other.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


# ---- batches ----


def test_fine_tuning_that_copies_ahead_is_the_same_run_and_resumes_to_the_bit(
    snippets: tuple[str, str, str], tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    model, data, _ = snippets
    plain = tuner(model, data, tmp_path / "plain")
    losses = [plain.train_step() for _ in range(6)]
    events = request.getfixturevalue("copying")
    ahead = tuner(model, data, tmp_path / "ahead", save_every=1)
    found = [ahead.train_step() for _ in range(3)]
    keys = len(ahead.features[0].inputs)
    assert events == ["copy"] * 2 * keys + (["wait"] + ["copy"] * 2 * keys) * 3  # a step's two passes before it waits
    ahead._origin = 0.0
    ahead._save()
    ahead.close()
    again = tuner(model, data, tmp_path / "ahead", save_every=1, resume="auto")
    assert found + [again.train_step() for _ in range(3)] == losses
    assert_same_weights(again.model, plain.model)


def test_images_that_are_copied_ahead_are_the_same_run(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    plain = image_trainer(tmp_path / "plain")
    assert plain.run()
    events = request.getfixturevalue("copying")
    ahead = image_trainer(tmp_path / "ahead")
    assert ahead.run()
    steps = len(ahead.loader)
    assert events == ["copy"] * 2 + ["wait", "copy", "copy"] * (steps - 1) + ["wait"]
    assert_same_weights(ahead.model, plain.model)


# ---- a step ----


class FakeGpu:
    """Tensors that say that they lie on a GPU and hold nothing. `events`: each time that something waits for them, and
    each backward pass, which leaves gradients (autograd would ask for the driver).
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, parameters: Callable[[], Iterator[nn.Parameter]]) -> None:
        kernels = pytest.importorskip("bigmodel_fast.kernels.optim")
        self.events: list[str] = []
        self.mode = FakeTensorMode()

        def backward(loss: Tensor) -> None:
            assert loss.device.type == "cuda"
            self.events.append("backward")
            for p in parameters():
                if p.requires_grad:
                    p.grad = torch.empty_like(p)

        def waits(value: Any) -> Callable[[Tensor], Any]:
            def wait(t: Tensor) -> Any:
                if t.device.type == "cuda":
                    self.events.append("wait")
                return value if t.dim() == 0 else [value] * t.numel()

            return wait

        monkeypatch.setattr(Tensor, "backward", backward)
        for name, value in (("item", 1.0), ("tolist", 1.0), ("__bool__", True), ("__int__", 1)):
            for kind in (Tensor, FakeTensor):
                monkeypatch.setattr(kind, name, waits(value), raising=False)
        monkeypatch.setattr(kernels, "_launch", lambda *_: None)  # it reads addresses

    def move(self, model: nn.Module) -> None:
        for module in model.modules():
            for tensors in (module._parameters, module._buffers):
                for name, t in tensors.items():
                    if t is not None:
                        on_gpu = self.like(t)
                        tensors[name] = nn.Parameter(on_gpu, t.requires_grad) if isinstance(t, nn.Parameter) else on_gpu

    def like(self, t: Tensor) -> Tensor:
        with self.mode:
            return torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="cuda")


DATA: dict[str, Callable[[Path], tuple[str, str]]] = {
    "classify": lambda folder: labelled_code(folder)[:2],
    "tokens": lambda folder: _bert_and(folder, tagged_code(4), lambda row: " ".join(row["tokens"])),
    "qa": lambda folder: _bert_and(folder, questions(60), lambda row: row["context"]),
    "seq2seq": lambda folder: (
        tiny_bart(folder / "bart", [" ".join(row.values()) for row in phrases(60)]),
        write_lines(folder / "data.jsonl", phrases(60)),
    ),
}


def _bert_and(folder: Path, rows: list[dict[str, Any]], text: Callable[[dict[str, Any]], str]) -> tuple[str, str]:
    return tiny_bert(folder / "bert", map(text, rows)), write_lines(folder / "data.jsonl", rows)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("task", DATA)
def test_a_step_of_fine_tuning_is_launched_before_it_waits(
    task: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, data = DATA[task](tmp_path)
    one = tuner(model, data, tmp_path / "run", task=task, max_length=40, stride=8)
    numbers, passes = one.feed.next()
    gpu = FakeGpu(monkeypatch, lambda: one.model.parameters())
    gpu.move(one.model)
    one.device, one.dtype = CUDA, "bf16"
    passes = [({key: gpu.like(t) for key, t in batch.items()}, share) for batch, share in passes]
    one.feed = SimpleNamespace(next=lambda: (numbers, passes), look_ahead=lambda: gpu.events.append("look ahead"))
    bmf.explain(reset=True)
    with gpu.mode:
        one.optimizer = AdamW(pretrained.parameter_groups(one.model, 1e-3, 0.01, 1.0), lr=1e-3)
        one.train_step()
    assert gpu.events == ["backward", "backward", "look ahead", "wait", "wait", "wait"]  # for two losses and the norm
    calls = bmf.explain(reset=True).calls
    assert {"attention", "AdamW"} <= {call.op for call in calls}
    assert {call.path for call in calls if not call.op.startswith("accelerate")} == {"triton"}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("model", ["mlp", "vit", "torchvision/resnet18"])
def test_a_step_on_images_is_launched_before_it_waits(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if model.startswith("torchvision"):
        pytest.importorskip("torchvision", exc_type=ImportError)
    monkeypatch.setattr(setup, "pick_device", lambda name: torch.device("cpu"))
    one = image_trainer(tmp_path, model=model)
    gpu = FakeGpu(monkeypatch, lambda: one.model.parameters())
    gpu.move(one.model)
    one.device, one.dtype, one._native, one._saved = CUDA, "bf16", False, time.monotonic()
    pixels, labels = gpu.like(torch.empty(16, 1, 8, 8)), gpu.like(torch.empty(16, dtype=torch.int64))
    bmf.explain(reset=True)
    with gpu.mode:
        one.optimizer = AdamW(one.model.parameters(), lr=1e-3)
        one._train_step(pixels, labels, lambda: gpu.events.append("look ahead"))
    assert gpu.events == ["backward", "look ahead", "wait"]
    calls = [call for call in bmf.explain(reset=True).calls if not call.op.startswith("accelerate")]
    assert {"AdamW", "clip_grad_norm_", "cross_entropy"} <= {call.op for call in calls}
    assert {call.path for call in calls} == {"triton"}


# ---- options ----


@no_gpu
@pytest.mark.parametrize("command", ["finetune", "evaluate", "train-image"])
def test_a_gpu_that_is_not_there_is_one_line(command: str, snippets, tmp_path: Path, capsys) -> None:
    model, data, _ = snippets
    given = ["--model", model, "--data", data] if command != "train-image" else []
    given += ["--task", "classify"] if command == "evaluate" else []
    assert main([command, *given, "--device", "cuda", "--out", str(tmp_path / "out")]) == 2
    said = f"bigmodel-fast {command}: device: cuda was asked for, but this torch finds no CUDA device\n"
    assert capsys.readouterr().err == said
    assert not (tmp_path / "out").exists()


def test_a_gpu_is_taken_where_there_is_one_and_computes_in_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert setup.pick_device("auto").type == "cuda"
    assert setup.pick_device("cpu").type == "cpu"
    assert {FinetuneConfig().device, EvaluateConfig().device, ImageTrainConfig().device} == {"auto"}
    assert setup.pick_dtype("auto", CUDA) == "bf16"


@pytest.mark.parametrize("what", ["finetune", "train-image"])
def test_a_compiled_run_learns_the_same(
    what: str, snippets: tuple[str, str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    torch._dynamo.reset()
    losses = {}
    for compiles in (False, True):
        if what == "finetune":
            one = tuner(*snippets[:2], tmp_path / f"{compiles}", compile=compiles, dtype="fp32")
            one.model.eval().train = lambda: None  # no dropout, whose choices would differ
            losses[compiles] = [one.train_step() for _ in range(4)]
        else:
            one = image_trainer(tmp_path / f"{compiles}", compile=compiles, dtype="fp32", vit=ViTShape(layers=1))
            ends: list[images.EpochEnd] = []
            assert one.run(ends.append)
            losses[compiles] = [end.loss for end in ends]
        assert isinstance(one._forward, torch._dynamo.OptimizedModule) == compiles
    assert losses[True] == pytest.approx(losses[False], rel=1e-3)


@pytest.mark.parametrize("module", [tuning, images])
def test_no_compiler_is_one_line_before_any_work(module, snippets, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(module, "cannot_compile", lambda device: "torch.compile needs a compiler")
    start = functools.partial(tuner, *snippets[:2]) if module is tuning else image_trainer
    with pytest.raises(ConfigError, match=r"compile: torch\.compile needs a compiler"):
        start(tmp_path / "run", compile=True)
    assert not (tmp_path / "run").exists()


# ---- memory ----


def full(*_: object, **__: object) -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB\nMore lines")


def test_too_little_memory_for_images_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = image_trainer(tmp_path / "run")
    with monkeypatch.context() as patch:
        patch.setattr(one.model, "forward", full)
        with pytest.raises(TrainError) as raised:
            one.run()
    assert str(raised.value) == (
        "epoch 0: out of memory with 128 images a step; lower --batch, or take a smaller model"
    )
    monkeypatch.setattr(nn.Module, "to", full)
    with pytest.raises(TrainError, match="out of memory for the model itself; take a smaller one"):
        image_trainer(tmp_path / "other")
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("when", ["moved", "measured"])
def test_too_little_memory_for_a_measurement_is_one_line(when: str, tmp_path: Path, monkeypatch) -> None:
    model, data, _ = labelled_code(tmp_path / "data")
    assert tuner(model, data, tmp_path / "run", steps=1, optim={"batch": 64}).run().finished
    if when == "moved":
        monkeypatch.setattr(nn.Module, "to", full)
    else:
        monkeypatch.setattr("bigmodel_fast.train.evaluation.judge", full)
    with pytest.raises(TrainError, match="evaluate: out of memory; lower --batch"):
        evaluate(EvaluateConfig(model=str(tmp_path / "run"), data=data))


# ---- what benchmarks/gpu.py runs on a GPU ----


@pytest.mark.parametrize("name", ["finetune", "train-image --model mlp", "train-image --model vit"])
def test_commands_that_train_are_checks_that_can_fail(name: str, monkeypatch) -> None:
    check = dict(gpu_worker.checks_of("facts:0/1", torch.device("cpu")))[f"bigmodel-fast {name}"]
    assert check().startswith("loss ")
    monkeypatch.setattr(gpu_commands, "losses", lambda *_: [])
    monkeypatch.setattr(gpu_commands, "command", lambda *_: [1.0, 2.0])
    with pytest.raises(AssertionError, match="losses"):
        check()
