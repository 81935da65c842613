"""Names of classes: found in the training examples, or those that a fine-tuned model has."""

from collections.abc import Iterable, Mapping

from ...data import DataError, Example


class Labels:
    """Names of classes, numbered.

    Args:
        found: the label of each training example or word, with the example it stands in; none when a model that has
            been fine-tuned is evaluated.
        known: the model's id2label. Its order is kept if its names are no placeholders (LABEL_0) and cover what was
            found; else labels are sorted, as numbers if all of them are.
    """

    def __init__(self, found: Iterable[tuple[str, Example]], known: Mapping[int, str], field: str):
        self.field = field
        names: dict[str, int] = {}
        first: Example | None = None
        for label, example in found:
            names[label] = names.get(label, 0) + 1
            first = first or example
        given = [known[i] for i in sorted(known)]
        placeholders = bool(names) and any(name.startswith("LABEL_") for name in given)
        if given and not placeholders and set(names) <= set(given):
            self.names = given
        else:
            numeric = all(name.lstrip("-").isdecimal() for name in names)
            self.names = sorted(names, key=int if numeric else str)  # type: ignore[arg-type]
        if first is not None and len(self.names) < 2:
            raise first.error(field, f"all labels are {self.names[0]}; a classifier needs two or more")
        self.counts = [names.get(name, 0) for name in self.names]
        self._numbers = {name: i for i, name in enumerate(self.names)}

    def __len__(self) -> int:
        return len(self.names)

    def number(self, name: str, example: Example) -> int:
        """DataError, naming the place, for a label that training has not seen."""
        if name not in self._numbers:
            shown = ", ".join(self.names[:12]) + (", ..." if len(self.names) > 12 else "")
            raise _unknown(example, self.field, name, shown)
        return self._numbers[name]

    def model_options(self) -> dict[str, object]:
        return {
            "num_labels": len(self.names),
            "id2label": dict(enumerate(self.names)),
            "label2id": {name: i for i, name in enumerate(self.names)},
        }


def _unknown(example: Example, field: str, name: str, known: str) -> DataError:
    return example.error(field, f"unknown label {name}; the model's are {known}")
