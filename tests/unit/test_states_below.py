"""Start a second pass over the same batches at the first changed layer, with the same numbers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, nn

import emoe
from benchmarks.harness.config.methods import block_of
from benchmarks.harness.models.prefix import StatesBelow, has_prefix
from emoe.architectures import find_ffns
from tests import tiny_models
from tests.tiny_models import VOCABULARY, build

KNOWN = ("bert", "roberta", "xlm-roberta", "electra", "gpt2", "llama", "mistral", "qwen2", "qwen3", "VisionTransformer")
EXPERTS = emoe.EMoEConfig(num_experts=8, top_k=2, layers=(2,))


def batches(name: str) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    if name == "VisionTransformer":
        return [{"x": torch.randn(rows, 3, 160, 160, generator=generator)} for rows in (3, 2)]
    given = []
    for rows, length in ((3, 7), (2, 5)):
        ids = torch.randint(3, VOCABULARY, (rows, length), generator=generator)
        mask = torch.ones_like(ids)
        mask[0, length - 2 :] = 0
        given.append({"input_ids": ids, "attention_mask": mask})
    return given


@torch.inference_mode()
def outputs(model: nn.Module, given: list[dict[str, Tensor]]) -> list[Tensor]:
    return [tiny_models.output(model, batch) for batch in given]


@contextmanager
def counted(model: nn.Module) -> Iterator[Callable[[], list[int]]]:
    """Count how often each FFN's out-projection runs."""
    calls: Counter[int] = Counter()
    ffns = find_ffns(model)
    hooks = [ffn.proj_out.register_forward_hook(lambda *_, i=i: calls.update([i])) for i, ffn in enumerate(ffns)]
    yield lambda: [calls[number] for number in range(len(ffns))]
    for hook in hooks:
        hook.remove()


@pytest.mark.parametrize("name", KNOWN)
def test_the_second_pass_is_that_of_the_whole_model_and_begins_at_the_layer(name: str) -> None:
    model, given = build(name).eval(), batches(name)
    below = StatesBelow(model, 2)
    with below.recording():
        dense = outputs(model, given)
    emoe.convert_(model, EXPERTS)
    emoe.set_backend_(model, "masked")  # which hooks that count would make it take
    wanted = outputs(model, given)
    assert not torch.equal(wanted[0], dense[0])
    for _ in range(2):  # it can be had as often as one likes
        with counted(model) as calls, below.replaying():
            assert all(map(torch.equal, outputs(model, given), wanted))
        assert calls()[:2] == [0, 0]
        assert calls()[3] == 2
    with counted(model) as calls:
        assert all(map(torch.equal, outputs(model, given), wanted))  # and leaves nothing behind
    assert calls()[:2] == [2, 2]
    assert not any("forward" in model.get_submodule(block_of(ffn.name)).__dict__ for ffn in find_ffns(model))


@pytest.mark.parametrize(
    ("layer", "options", "counts"),
    [
        (0, {}, [2, 2, 2, 2]),
        (1, {}, [0, 2, 2, 2]),
        (3, {}, [0, 0, 0, 2]),
        (2, {"room": 3 * 7 * 32 * 4}, [1, 1, 2, 2]),  # for the first batch alone: the other is computed again
    ],
)
def test_any_layer_may_be_the_first_that_differs(layer: int, options: dict[str, int], counts: list[int]) -> None:
    model, given = build("bert").eval(), batches("bert")
    below = StatesBelow(model, layer, **options)
    with below.recording():
        wanted = outputs(model, given)
    with counted(model) as calls, below.replaying():
        assert all(map(torch.equal, outputs(model, given), wanted))
    assert calls() == counts


def test_other_batches_are_refused() -> None:
    model, given = build("bert").eval(), batches("bert")
    below = StatesBelow(model, 2)
    with below.recording():
        outputs(model, given)
    changed = [{**given[0], "input_ids": given[0]["input_ids"].flip(1)}]
    for others in (given[::-1], given * 2, changed):
        with below.replaying(), pytest.raises(RuntimeError, match="this pass is over other batches"):
            outputs(model, others)
    assert len(outputs(model, given[::-1])) == 2  # the model is as it was


def test_layers_below_that_others_read_too_are_not_left_out() -> None:
    model = build("t5").eval()
    assert not has_prefix(model)
    ids = torch.randint(3, VOCABULARY, (2, 5), generator=torch.Generator().manual_seed(0))
    given = [{"input_ids": ids, "decoder_input_ids": ids}]
    below = StatesBelow(model, 3)
    with below.recording():
        wanted = outputs(model, given)
    with below.replaying():
        assert torch.equal(outputs(model, given)[0], wanted[0])
