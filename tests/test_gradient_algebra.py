"""E28: the first step of full fine-tuning and of LoRA, against the closed forms of the paper's gradient algebra."""

import peft
import pytest
import torch

from intruder.weights import model_pairs

RATE = 0.05


class OneLayer(torch.nn.Module):
    """Y = W X with X given as rows, inside a numbered layer so that its matrix is a counted one."""

    def __init__(self, weight: torch.Tensor):
        super().__init__()
        self.layer = torch.nn.ModuleList([torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False)])
        self.layer[0].weight = torch.nn.Parameter(weight.clone())

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        return self.layer[0](rows)


def problem(dtype: torch.dtype = torch.float64):
    generator = torch.Generator().manual_seed(0)
    W0 = torch.randn(7, 5, generator=generator, dtype=dtype)
    rows, target = (
        torch.randn(11, 5, generator=generator, dtype=dtype),
        torch.randn(11, 7, generator=generator, dtype=dtype),
    )
    return W0, rows, target


def loss_of(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return (output - target).square().sum() / 2


def gradient_by_hand(W0, rows, target) -> torch.Tensor:
    """G = (dL/dY) X^T with Y = W0 X, X the transpose of the rows: for L = |Y - T|^2 / 2, dL/dY = Y - T."""
    return (W0 @ rows.T - target.T) @ rows


def one_step(model: torch.nn.Module, rows, target) -> None:
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=RATE)
    loss_of(model(rows), target).backward()
    optimizer.step()


def test_the_first_full_step_is_minus_eta_G():
    """One SGD step on W gives Delta W = -eta G."""
    W0, rows, target = problem()
    model = OneLayer(W0)
    one_step(model, rows, target)
    change = model.layer[0].weight.detach() - W0
    torch.testing.assert_close(change, -RATE * gradient_by_hand(W0, rows, target), rtol=0, atol=1e-6)


@pytest.mark.parametrize("rank, alpha", [(1, 2), (2, 4), (4, 8), (4, 1), (5, 16)])
def test_the_first_lora_step_is_minus_eta_scale_squared_G_A0t_A0(rank, alpha):
    """One SGD step of PEFT's LoRA from B = 0 gives Delta W = -eta (alpha / r)^2 G A0^T A0."""
    W0, rows, target = problem()
    model = peft.get_peft_model(OneLayer(W0), peft.LoraConfig(r=rank, lora_alpha=alpha, target_modules=["0"])).double()
    layer = model.base_model.model.layer[0]
    A0 = layer.lora_A["default"].weight.detach().clone()
    assert not layer.lora_B["default"].weight.any()
    torch.testing.assert_close(model(rows), rows @ W0.T, rtol=0, atol=1e-12)
    one_step(model, rows, target)
    B1, A1 = layer.lora_B["default"].weight.detach(), layer.lora_A["default"].weight.detach()
    G = gradient_by_hand(W0, rows, target)
    expected = -RATE * (alpha / rank) ** 2 * G @ A0.T @ A0
    assert expected.abs().max() > 1e-3
    torch.testing.assert_close(A1, A0, rtol=0, atol=0)  # dL/dA = (alpha / r) B^T G = 0 while B = 0
    torch.testing.assert_close((alpha / rank) * B1 @ A1, expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(layer.base_layer.weight.detach(), W0, rtol=0, atol=0)


def test_the_factors_have_the_gradients_of_the_paper():
    """dL/dB = (alpha / r) G A^T and dL/dA = (alpha / r) B^T G at a point where B is not zero."""
    W0, rows, target = problem()
    model = peft.get_peft_model(OneLayer(W0), peft.LoraConfig(r=3, lora_alpha=6, target_modules=["0"])).double()
    layer = model.base_model.model.layer[0]
    A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    with torch.no_grad():
        B.copy_(torch.randn(B.shape, generator=torch.Generator().manual_seed(1), dtype=B.dtype))
    loss_of(model(rows), target).backward()
    G = gradient_by_hand(W0 + 2 * B.detach() @ A.detach(), rows, target)
    torch.testing.assert_close(B.grad, 2 * G @ A.detach().T, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(A.grad, 2 * B.detach().T @ G, rtol=1e-9, atol=1e-9)


def test_the_measured_update_of_the_first_step_is_the_closed_form():
    """The float32 pair that this library measures after one LoRA step carries the closed form too."""
    W0, rows, target = problem(torch.float32)
    model = peft.get_peft_model(OneLayer(W0), peft.LoraConfig(r=2, lora_alpha=4, target_modules=["0"]))
    A0 = model.base_model.model.layer[0].lora_A["default"].weight.detach().clone()
    one_step(model, rows, target)
    (pair,) = model_pairs({"layer.0.weight": W0}, model)
    expected = -RATE * 4 * gradient_by_hand(W0.double(), rows.double(), target.double()) @ A0.double().T @ A0.double()
    torch.testing.assert_close(pair.update.double(), expected, rtol=1e-5, atol=1e-6)
