"""A table of numbers: scikit-learn's breast-cancer data, five-fold, with recall, F1 and the ROC curve.

    python examples/tabular.py [--out roc.png]

569 tumours, 30 measurements each. A missed malignant one is the costly mistake, so malignant is the class that counts.
"""

import argparse
import time
from pathlib import Path

import torch
from sklearn.datasets import load_breast_cancer
from sklearn.metrics import RocCurveDisplay, confusion_matrix, f1_score, precision_score, recall_score, roc_auc_score
from sklearn.model_selection import StratifiedKFold
from sklearn.preprocessing import StandardScaler

from bigmodel_fast.data import ArrayLoader
from bigmodel_fast.models import MLP
from bigmodel_fast.train import MLPTrainer

FOLDS, EPOCHS, BATCH, LR = 5, 60, 16, 2e-3


def probabilities(x: torch.Tensor, y: torch.Tensor, unseen: torch.Tensor, seed: int) -> torch.Tensor:
    """How likely each row of `unseen` is malignant, by a network that has learned `x` and `y`."""
    torch.manual_seed(seed)
    model = MLP([x.shape[1], 32, 16, 2], activation="silu", dropout=0.2)
    trainer = MLPTrainer(model, "cross_entropy", torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=0.1))
    loader = ArrayLoader(x, y, batch_size=BATCH, shuffle=True)
    for _ in range(EPOCHS):
        trainer.epoch(loader)
    with torch.no_grad():
        return model.eval()(unseen).softmax(1)[:, 1]


def run(folds: int = FOLDS) -> dict[str, object]:
    """Figures over all rows, each judged by the network that has not seen it."""
    x, benign = load_breast_cancer(return_X_y=True)
    y = torch.from_numpy(1 - benign)  # 1: malignant
    likely = torch.zeros(len(y))
    started = time.perf_counter()
    for fold, (seen, unseen) in enumerate(StratifiedKFold(folds, shuffle=True, random_state=0).split(x, y)):
        scaler = StandardScaler().fit(x[seen])
        rows = torch.from_numpy(scaler.transform(x)).float()
        likely[unseen] = probabilities(rows[seen], y[seen], rows[unseen], fold)
    called = likely > 0.5
    return {
        "seconds": time.perf_counter() - started,
        "accuracy": float((called == y).float().mean()),
        "precision": float(precision_score(y, called)),
        "recall": float(recall_score(y, called)),
        "f1": float(f1_score(y, called)),
        "auc": float(roc_auc_score(y, likely)),
        "confusion": confusion_matrix(y, called).tolist(),
        "labels": y,
        "likely": likely,
    }


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Breast-cancer data by the native MLP engine.")
    parser.add_argument("--out", type=Path, help="write the ROC curve there, as a PNG")
    arguments = parser.parse_args(argv)
    found = run()
    names = ("accuracy", "precision", "recall", "f1", "auc")
    print("  ".join(f"{name} {found[name]:.3f}" for name in names) + f"  in {found['seconds']:.2f} s of training")
    print(f"benign and malignant, called so: {found['confusion']}")
    if arguments.out:
        import matplotlib

        matplotlib.use("Agg")
        shown = RocCurveDisplay.from_predictions(found["labels"], found["likely"], name="MLP", plot_chance_level=True)
        shown.ax_.set_title("Malignant tumours", loc="left", fontweight="bold")
        shown.figure_.savefig(arguments.out, dpi=144)


if __name__ == "__main__":
    main()
