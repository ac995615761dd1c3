"""Every registered architecture keeps the library's promises."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch

import emoe
from emoe.architectures import find_ffns
from tests import tiny_models
from tests.conftest import SHIPPED
from tests.model_folders import assert_same

ARCHITECTURES = sorted(tiny_models.BUILDERS)
EMOE = emoe.EMoEConfig(num_experts=8, top_k=2, layers="last-half:1")
PUBLISHED = emoe.EMoEConfig.as_published(
    "tutel", num_experts=8, top_k=2, layers=[1, 3], gate_momentum=0.5
)
LEARNED = emoe.EMoEConfig(
    num_experts=8, top_k=4, layers=[1], router="cosine", weighting="softmax_times_k"
)


def test_each_row_has_a_tiny_model() -> None:
    assert {name.split()[0] for name in ARCHITECTURES} == SHIPPED


@pytest.mark.parametrize("name", ARCHITECTURES)
class TestContract:
    def test_all_experts_equal_the_dense_model(self, name: str) -> None:
        model, values = tiny_models.build(name), tiny_models.inputs(name)
        dense = tiny_models.output(model, values)
        emoe.convert_(model, emoe.EMoEConfig(num_experts=8, top_k=8, layers="all"))
        torch.testing.assert_close(tiny_models.output(model, values), dense, atol=1e-5, rtol=1e-5)

    @torch.no_grad()  # without gradients, torch's fused encoder layers would bypass the experts
    def test_fewer_experts_change_the_output_until_they_are_folded_back(self, name: str) -> None:
        model, values = tiny_models.build(name), tiny_models.inputs(name)
        parameters = dict(model.named_parameters())
        dense, state = tiny_models.output(model, values), copy.deepcopy(model.state_dict())
        emoe.convert_(model, EMOE)
        assert all(
            model.get_parameter(key) is parameter for key, parameter in parameters.items()
        )  # for optimizers
        assert {k: v.shape for k, v in model.state_dict().items()} == {
            k: v.shape for k, v in state.items()
        }
        assert (tiny_models.output(model, values) - dense).abs().max() > 1e-3
        emoe.to_dense_(model, restore_order=True)
        assert torch.equal(tiny_models.output(model, values), dense)
        assert all(torch.equal(tensor, state[key]) for key, tensor in model.state_dict().items())

    def test_gradient_is_zero_for_neurons_that_no_token_used(self, name: str) -> None:
        model, values = tiny_models.build(name), tiny_models.inputs(name, rows=1)
        emoe.convert_(model, emoe.EMoEConfig(num_experts=16, top_k=1, layers=[3]))
        with emoe.record_routing(model) as record:
            tiny_models.output(model, values).square().sum().backward()
        ffn = find_ffns(model)[3]
        grads = ffn.proj_in.weight.grad.t() if ffn.spec.transposed else ffn.proj_in.weight.grad
        grads = grads[: ffn.d].unflatten(0, (16, -1)).abs().sum((1, 2))
        loads = record.layers[3].loads
        assert grads[loads == 0].eq(0).all()
        assert grads[loads > 0].gt(0).all()

    @pytest.mark.parametrize("config", [EMOE, PUBLISHED, LEARNED])
    def test_checkpoint_loads_with_emoe_and_with_the_models_own_library(
        self, name: str, config, tmp_path: Path
    ) -> None:
        model, values = tiny_models.build(name), tiny_models.inputs(name)
        dense = tiny_models.output(model, values)
        emoe.convert_(model, config)
        expected = tiny_models.output(model, values)
        emoe.save_pretrained(model, tmp_path)
        again = emoe.from_pretrained(
            tiny_models.loader(name), tmp_path, **tiny_models.load_options(name)
        )
        torch.testing.assert_close(
            tiny_models.output(again, values), expected, atol=1e-6, rtol=1e-6
        )
        stock = tiny_models.stock(name, tmp_path)
        if hasattr(model, "save_pretrained"):  # transformers finds the experts
            assert_same(stock.state_dict(), again.state_dict())
            assert torch.equal(tiny_models.output(stock, values), tiny_models.output(again, values))
        else:  # timm and torch read the dense model
            torch.testing.assert_close(
                tiny_models.output(stock, values), dense, atol=1e-5, rtol=1e-5
            )

    def test_gmoe_starts_as_the_dense_model_and_learns(self, name: str, tmp_path: Path) -> None:
        model, values = tiny_models.build(name), tiny_models.inputs(name)
        dense = tiny_models.output(model, values)
        emoe.convert_(model, emoe.GMoEConfig(num_experts=4, top_k=2, layers=[1, 3]))
        torch.testing.assert_close(tiny_models.output(model, values), dense, atol=1e-5, rtol=1e-5)
        optimizer = torch.optim.SGD(model.train().parameters(), lr=0.1)
        (tiny_models.output(model, values).square().mean() + emoe.aux_loss(model)).backward()
        optimizer.step()
        trained = tiny_models.output(model.eval(), values)
        emoe.save_pretrained(model, tmp_path)
        again = emoe.from_pretrained(
            tiny_models.loader(name), tmp_path, **tiny_models.load_options(name)
        )
        torch.testing.assert_close(tiny_models.output(again, values), trained, atol=1e-6, rtol=1e-6)
        with pytest.raises(emoe.ConversionError, match="no dense equal"):
            emoe.to_dense_(model)
