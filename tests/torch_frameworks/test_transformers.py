"""transformers.Trainer over a small GPT-2 that is made here: both ways to give it an optimizer, and its checkpoints."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch
from conftest import same_bits
from framework_cases import torchs
from torch_cases import FULL, close, full
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments, set_seed

import fused_adam.torch as ours

STEPS = 6


def model(dtype: Any = torch.float64) -> Any:
    """Untrained, and the same each time; with the seed from which its dropout draws afterwards."""
    set_seed(0)
    ends = {"bos_token_id": 0, "eos_token_id": 0}
    return GPT2LMHeadModel(GPT2Config(vocab_size=16, n_positions=8, n_embd=8, n_layer=1, n_head=2, **ends)).to(dtype)


def texts() -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(16, (40, 8), generator=generator)
    return [{"input_ids": row, "labels": row} for row in tokens]


def trainer(folder: Path, cls: Any, kwargs: dict[str, Any], how: str = "optimizers", **arguments: Any) -> Any:
    made = model(torch.float32 if arguments else torch.float64)
    if how == "optimizers":
        opt = cls(made.parameters(), **kwargs)
        given = {"optimizers": (opt, torch.optim.lr_scheduler.StepLR(opt, 2, gamma=0.7))}
    else:
        given = {"optimizer_cls_and_kwargs": (cls, kwargs)}
    arguments = TrainingArguments(
        output_dir=str(folder),
        use_cpu=True,
        max_steps=STEPS,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        save_strategy="steps",
        save_steps=STEPS // 2,
        report_to="none",
        disable_tqdm=True,
        **arguments,
    )
    return Trainer(made, arguments, train_dataset=texts(), **given)


def trained(made: Any, **kwargs: Any) -> list[Any]:
    made.train(**kwargs)
    return [p.detach() for p in made.model.parameters()]


@pytest.mark.parametrize("how", ["optimizers", "optimizer_cls_and_kwargs"])
@full
def test_trainer(name: str, kwargs: dict[str, Any], how: str, tmp_path: Path) -> None:
    """As with torch's class. Its gradient clipping is on by default, and dropout draws from the same seed."""
    start = [p.detach() for p in model().parameters()]
    other = trained(trainer(tmp_path / "b", torchs(name), kwargs, how))
    made = trainer(tmp_path / "a", getattr(ours, name), kwargs, how)
    close(trained(made), other, start, 1e-6)  # where attention's gradients are zero but for rounding
    assert type(made.optimizer.optimizer) is getattr(ours, name)


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize(
    ("name", "kwargs", "how"), [*((*row, "optimizers") for row in FULL), ("AdamW", {}, "optimizer_cls_and_kwargs")]
)
def test_resumes_bit_for_bit(name: str, kwargs: dict[str, Any], how: str, flat: bool, tmp_path: Path) -> None:
    cls, kwargs = getattr(ours, name), {**kwargs, "flat": flat}
    expected = trained(trainer(tmp_path, cls, kwargs, how))
    resumed = trainer(tmp_path, cls, {**kwargs, "lr": 0.5}, how)
    found = trained(resumed, resume_from_checkpoint=str(tmp_path / f"checkpoint-{STEPS // 2}"))
    for p, q in zip(found, expected, strict=True):
        assert same_bits(p, q)


@pytest.mark.parametrize("flat", [False, True])
def test_bfloat16(flat: bool, tmp_path: Path) -> None:
    start = [p.detach() for p in model(torch.float32).parameters()]
    mine = trained(trainer(tmp_path / "a", ours.AdamW, {"lr": 1e-3, "flat": flat}, bf16=True))
    other = trained(trainer(tmp_path / "b", torch.optim.AdamW, {"lr": 1e-3}, bf16=True))
    assert {p.dtype for p in mine} == {torch.float32}
    close(mine, other, start, 0.05)
