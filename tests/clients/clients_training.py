"""A few steps of training as a user of accelerate writes them, in a process group that is there already."""

from __future__ import annotations

from typing import Any

import torch
from accelerate import Accelerator  # type: ignore[import-untyped]
from accelerate.state import AcceleratorState  # type: ignore[import-untyped]
from torch.utils.data import DataLoader, TensorDataset

__all__ = ["train"]

STEPS = 6


def train() -> dict[str, Any]:
    """Collective over the default group: the losses of this rank, the mean over the ranks, and the weights in the end."""
    AcceleratorState._reset_state(reset_partial_state=True)  # accelerate keeps the first process group that it saw
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    torch.manual_seed(5)
    model = torch.nn.Sequential(torch.nn.Linear(16, 64), torch.nn.GELU(), torch.nn.Dropout(0.1), torch.nn.Linear(64, 4))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, total_iters=STEPS)
    x = torch.randn(STEPS * 16, 16)
    data = DataLoader(TensorDataset(x, (x[:, :4] > 0).long().argmax(-1)), batch_size=8, shuffle=True)
    model, optimizer, data, schedule = accelerator.prepare(model, optimizer, data, schedule)
    losses, means = [], []
    for inputs, labels in data:
        with accelerator.accumulate(model):
            loss = torch.nn.functional.cross_entropy(model(inputs), labels)
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        losses.append(loss.item())
        means.append(accelerator.reduce(loss.detach(), "mean").item())
    accelerator.wait_for_everyone()
    return {
        "kind": str(accelerator.distributed_type),
        "wrapped in": type(model).__name__,
        "losses": torch.tensor(losses),
        "means": torch.tensor(means),
        "everyone's last": accelerator.gather(torch.tensor([losses[-1]])),
        "for metrics": accelerator.gather_for_metrics(labels),
        "padded": accelerator.pad_across_processes(torch.ones(accelerator.process_index + 1, 2)),
        **{f"weight {name}": p.detach().clone() for name, p in accelerator.unwrap_model(model).named_parameters()},
    }
