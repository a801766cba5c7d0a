"""Lightning's Trainer: its loop and one of one's own, clipping in every precision, and checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from conftest import same_bits
from framework_cases import batch, network, torchs
from lightning.pytorch.plugins.precision import MixedPrecision
from torch_cases import close, full

import fused_adam.torch as ours

pytestmark = [
    # Of torch, and Lightning still asks that way.
    pytest.mark.filterwarnings(r"ignore:`isinstance\(treespec, LeafSpec\)` is deprecated:FutureWarning"),
    # On machines with more than two cores.
    pytest.mark.filterwarnings("ignore:The 'train_dataloader' does not have many workers:UserWarning"),
]
BATCHES, EPOCHS = 6, 2


class Module(lightning.LightningModule):
    def __init__(self, cls: Any, kwargs: dict[str, Any], dtype: Any = torch.float64) -> None:
        super().__init__()
        self.cls, self.kwargs, self.dtype_ = cls, kwargs, dtype
        self.network = network(dtype)
        self.rates: list[float] = []

    def configure_optimizers(self) -> Any:
        opt = self.cls(self.network.parameters(), **self.kwargs)
        scheduler = torch.optim.lr_scheduler.StepLR(opt, 2, gamma=0.7)
        return {"optimizer": opt, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def train_dataloader(self) -> Any:
        return torch.utils.data.DataLoader(
            torch.utils.data.TensorDataset(*batch(0, self.dtype_, 4 * BATCHES)), batch_size=4
        )

    def loss(self, pair: Any) -> Any:
        x, y = pair
        return ((self.network(x) - y) ** 2).mean()

    def training_step(self, pair: Any, n: int) -> Any:
        self.rates.append(self.optimizers().param_groups[0]["lr"])
        return self.loss(pair)


class Manual(Module):
    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.automatic_optimization = False

    def training_step(self, pair: Any, n: int) -> None:
        opt = self.optimizers()
        opt.zero_grad()
        self.manual_backward(self.loss(pair))
        self.clip_gradients(opt, gradient_clip_val=1.0, gradient_clip_algorithm="norm")
        opt.step()
        self.lr_schedulers().step()
        self.rates.append(opt.param_groups[0]["lr"])


def trainer(folder: Path, epochs: int = EPOCHS, **kwargs: Any) -> Any:
    return lightning.Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=epochs,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        **kwargs,
    )


def trained(module: Any, folder: Path, **kwargs: Any) -> list[Any]:
    trainer(folder, **kwargs).fit(module)
    return [p.detach() for p in module.network.parameters()]


@pytest.mark.parametrize("flat", [False, True])
@full
def test_its_own_loop(name: str, kwargs: dict[str, Any], flat: bool, tmp_path: Path) -> None:
    start = [p.detach() for p in network().parameters()]
    modules = Module(getattr(ours, name), {**kwargs, "flat": flat}), Module(torchs(name), kwargs)
    options = {"gradient_clip_val": 1.0, "accumulate_grad_batches": 2}
    close(*(trained(module, tmp_path, **options) for module in modules), start)
    assert modules[0].rates == modules[1].rates and modules[0].rates[0] > modules[0].rates[-1]


@pytest.mark.parametrize("flat", [False, True])
def test_a_loop_of_ones_own(flat: bool, tmp_path: Path) -> None:
    start = [p.detach() for p in network().parameters()]
    modules = Manual(ours.AdamW, {"lr": 0.01, "flat": flat}), Manual(torch.optim.AdamW, {"lr": 0.01})
    close(*(trained(module, tmp_path) for module in modules), start)
    assert modules[0].rates == modules[1].rates


@pytest.mark.parametrize("flat", [False, True])
@full
def test_resumes_bit_for_bit(name: str, kwargs: dict[str, Any], flat: bool, tmp_path: Path) -> None:
    cls, kwargs = getattr(ours, name), {**kwargs, "flat": flat}
    expected = trained(Module(cls, kwargs), tmp_path, epochs=2 * EPOCHS)
    first = trainer(tmp_path)
    first.fit(Module(cls, kwargs))
    first.save_checkpoint(tmp_path / "half.ckpt")
    module = Module(cls, {**kwargs, "lr": 0.5})
    trainer(tmp_path, 2 * EPOCHS).fit(module, ckpt_path=tmp_path / "half.ckpt", weights_only=True)
    for p, q in zip(module.network.parameters(), expected, strict=True):
        assert same_bits(p.detach(), q)


def scaled(module: Any, folder: Path, **kwargs: Any) -> list[Any]:
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    return trained(module, folder, plugins=[MixedPrecision("16-mixed", "cpu", scaler)], **kwargs)


@pytest.mark.parametrize("precision", ["bf16-mixed", "16-mixed"])
def test_mixed_precision(precision: str, tmp_path: Path) -> None:
    """With gradients clipped; in float16 behind a scaler. Losses agree to what 16 bits leave."""
    start = [p.detach() for p in network(torch.float32).parameters()]
    ends = []
    for module in (ours, torch.optim):
        made = Module(module.AdamW, {"lr": 0.01}, torch.float32)
        if precision == "16-mixed":
            ends.append(scaled(made, tmp_path, gradient_clip_val=1.0))
        else:
            ends.append(trained(made, tmp_path, gradient_clip_val=1.0, precision=precision))
    close(*ends, start, 0.02)


def test_clipping_what_the_step_unscales_is_refused(tmp_path: Path) -> None:
    """By Lightning, which would clip scaled gradients. Without clipping it is right."""
    start = [p.detach() for p in network(torch.float32).parameters()]
    made = [Module(ours.AdamW, {"lr": 0.01, "amp_scaling": on}, torch.float32) for on in (True, False)]
    close(*(scaled(module, tmp_path) for module in made), start, 0.0)
    with pytest.raises(RuntimeError, match="does not allow for gradient clipping"):
        scaled(made[0], tmp_path, gradient_clip_val=1.0)
