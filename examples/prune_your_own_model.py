"""Your own network, data loader and loss: prune, save the plan, rebuild the compact model, run it in bare ONNX Runtime.

The network has two heads (a class and a brightness), batches are dictionaries, and the loss joins both heads: the
package asks for nothing but an ``nn.Module``, something to iterate over, and ``loss(model, batch)``.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset

import nni_prune_ext as npe
from nni_prune_ext.deployment import load_pruned, write_artefacts
from nni_prune_ext.training import TrainingSettings


class TwoHeads(nn.Module):
    """A residual trunk with a classification head and a regression head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU())
        self.block = nn.Sequential(nn.Conv2d(32, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU(), nn.Conv2d(64, 32, 1))
        self.stripes = nn.Linear(32, 2)
        self.brightness = nn.Linear(32, 1)

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Maps ``(N, 1, H, W)`` to two logits and a brightness per image."""
        x = self.stem(image)
        x = functional.relu(x + self.block(x)).mean((2, 3))
        return self.stripes(x), self.brightness(x)


class Stripes(Dataset):
    """Horizontal or vertical stripes of some brightness, drawn on demand."""

    def __len__(self) -> int:
        return 512

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(index)
        brightness = torch.rand(1, generator=generator)
        image = torch.zeros(1, 12, 12)
        image[:, ::2] = 1.0
        vertical = index % 2
        image = image.transpose(1, 2) if vertical else image
        noise = 0.3 * torch.randn(1, 12, 12, generator=generator)
        return {"image": brightness * image + noise, "vertical": torch.tensor(vertical), "brightness": brightness}


def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """What this network is trained for; only this function looks inside a batch."""
    stripes, brightness = model(batch["image"])
    return functional.cross_entropy(stripes, batch["vertical"]) + functional.mse_loss(brightness, batch["brightness"])


def main() -> None:
    torch.manual_seed(0)
    loader = DataLoader(Stripes(), batch_size=64, shuffle=True, generator=torch.Generator().manual_seed(0))
    model = TwoHeads()
    settings = TrainingSettings(learning_rate=0.05)
    npe.fit(model, loader, epochs=2, settings=settings, loss=loss)

    example = torch.randn(1, 1, 12, 12)
    result = npe.prune(
        model,
        example,
        method="taylor",
        target=["macs=0.4", "params=0.5"],
        train_batches=loader,
        loss=loss,
        recover_epochs=1,
        settings=settings,
    )
    for protected in result.groups.protected:
        print(f"stays whole: {protected.root}: {protected.reason}")
    for achieved in result.achieved:
        print(f"{achieved.target}: asked {achieved.asked:,.0f}, achieved {achieved.achieved:,.0f}")

    folder = Path("own_model")
    write_artefacts(result.model, folder, example, plan=result.plan)  # plan.json, model.safetensors, model.onnx

    rebuilt = load_pruned(TwoHeads(), folder, example).eval()  # from the original code, no pickle
    images = torch.randn(4, 1, 12, 12)
    with torch.no_grad():
        ours, theirs = result.model.eval()(images), rebuilt(images)
    print(f"rebuilt model equals the pruned one: {all(torch.equal(a, b) for a, b in zip(ours, theirs))}")

    session = onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
    outputs = session.run(None, {session.get_inputs()[0].name: images.numpy()})
    gap = max(float(np.abs(a.numpy() - b).max()) for a, b in zip(ours, outputs))
    print(f"largest difference between PyTorch and ONNX Runtime: {gap:.1e}")


if __name__ == "__main__":
    main()
