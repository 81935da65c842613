"""Wrong arguments: a typed error before any kernel runs, naming the argument, what came and what was expected."""

import pytest
import torch
from specs import Error, Spec, case_id, cases

import bigmodel_fast as bmf


@pytest.mark.parametrize(("spec", "error"), cases("errors"), ids=case_id)
def test_message(spec: Spec, error: Error) -> None:
    sample = spec.samples[0]
    bmf.explain(reset=True)
    with pytest.raises(error.type) as raised:
        spec.op(**{**sample.tensors(torch.float32), **sample.options, **error.changes})
    message = str(raised.value)
    assert message.startswith(f"{spec.name}: ")
    assert "\n" not in message
    for part in (error.argument, error.got, error.expected):
        assert part in message, f"{part!r} is missing in {message!r}"
    assert bmf.explain().calls == (), "a path was taken before the arguments were checked"
