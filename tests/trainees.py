"""What a step of the training loop works with, on the CPU or on a fake GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_cuda import CPU, CUDA, Watch, fake_gpu, move, one_of
from test_guides import GUIDES, METHODS, config_of
from torch import Tensor, nn
from torch._prims_common import suggest_memory_format
from torch.optim import Optimizer

from dali_views import Batch, RegionTable, SampleIndex
from dali_views.maps import heatmap
from dali_views.maps.align import Offset
from dali_views.tools.scenes import make_scenes
from trainers import config as cfg
from trainers.data import training_loader
from trainers.engine import optim, ranks
from trainers.engine.optim import Clock, Lars
from trainers.engine.setting import Setting, join
from trainers.guides import Training, build_guide
from trainers.guides.guide import Guide
from trainers.methods import Method, method_of, networks

ENCODERS = ("test_resnet", "test_vit", "test_convnext")
LOCAL = 4  # samples of a rank
CLOCK = Clock(5, 5, 3)


@dataclass
class Trainee:
    """The parts of a run that its steps use, on their device."""

    config: cfg.Config
    setting: Setting
    method: Method
    guide: Guide
    optimizer: Optimizer
    scaler: torch.amp.GradScaler
    batch: Batch

    def losses(self) -> tuple[Tensor, Tensor]:
        """Losses and their weights, (B,)."""
        ranks.seed_step(self.setting.seed, CLOCK.step)
        self.method.before_step(CLOCK)
        with self.setting.autocast():
            losses = self.guide.losses(self.method, self.batch)
        return losses, self.guide.weights(self.batch)

    def update(self) -> None:
        """What follows the backward pass."""
        self.scaler.unscale_(self.optimizer)
        optim.clip_each(self.method.parameters(), 3.0)
        self.method.after_backward(CLOCK)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.method.after_step(CLOCK)
        self.guide.after_batch(self.batch)

    def step_on_fakes(self) -> None:
        """One step under watch, with any gradients, and what must hold for what it computes and leaves."""
        for part in self.method.modules():
            if isinstance(part, (nn.Conv2d, nn.BatchNorm2d)):
                part.register_forward_hook(self._of_images)
        assert torch.backends.cudnn.benchmark, "cuDNN compares no algorithms"
        with Watch(CUDA):
            losses, weights = self.losses()
            self.scaler.scale((losses * weights).mean())
            for parameter in self.method.parameters():
                parameter.grad = torch.empty_like(parameter) if parameter.requires_grad else None
            self.update()
        for one in (losses, weights):
            assert (one.dtype, one.device, one.shape) == (torch.float32, CUDA, (LOCAL,))
        assert self.method.embedding.device == CUDA
        if not isinstance(self.optimizer, Lars):
            assert all(group["fused"] for group in self.optimizer.param_groups), "the optimiser is not fused"
        for parameter, state in self.optimizer.state.items():
            for one in filter(torch.is_tensor, state.values()):
                assert one.ndim == 0 or (one.device, one.stride()) == (CUDA, parameter.stride())

    def _of_images(self, part: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
        """A layer of images computes in half precision, and nothing is copied to change the memory format."""
        formats = [suggest_memory_format(one) for one in (*inputs, output)]
        assert formats == [torch.channels_last] * 2, f"{part}: {formats}"
        assert output.dtype == self.setting.precision


@dataclass(frozen=True)
class Case:
    """A combination of parts."""

    guide: str
    method: str
    encoder: str
    scenes: dict[str, Any]
    index: SampleIndex
    folder: Path

    @contextmanager
    def on(self, device: torch.device, *changes: str, world: int = 1) -> Iterator[Trainee]:
        """The parts on a device, as one of `world` ranks; fake on `CUDA`, as are tensors made inside."""
        small = {"model.backbone": self.encoder, "views.size": 64, "optim.batch": LOCAL * world}
        if "locals" in METHODS[self.method][1]:
            small["views.local_size"] = 32
        guide = GUIDES[self.guide]
        for key, section in (("guide", guide), ("guide.boxes", guide.get("boxes", {}))):
            if "layer" in section and self.encoder != "test_resnet":
                small[f"{key}.layer"] = "null"
        given = [*(f"{key}={value}" for key, value in small.items()), *changes]
        config = config_of(self.guide, self.scenes, self.folder / "run", *given, method=self.method)
        with one_of(world), pytest.MonkeyPatch.context() as patch:
            # How far maps lie beside images is measured once for a pass, which waits.
            patch.setattr(heatmap, "map_offset", lambda *_: Offset(0.4, -0.3))
            method = method_of(config).to(memory_format=torch.channels_last)
            if device == CPU:
                yield self._trainee(config, replace(join(config), precision=torch.bfloat16), method)
                return
            with fake_gpu():
                run = config.run.model_copy(update={"device": "gpu"})
                setting = join(config.model_copy(update={"run": run}))
                if method.sync_bn and world > 1:
                    method = networks.synced_batch_norm(method)
                move(method)
                yield self._trainee(config, setting, method)

    def _trainee(self, config: cfg.Config, setting: Setting, method: Method) -> Trainee:
        # The loader only draws plans here, so it may be one for the CPU.
        regions, planning = RegionTable(len(self.index), config.regions), replace(setting, device=CPU)
        loader = training_loader(planning, config.views, self.index, regions, method.split_bn)
        drawn, dtype = loader.plan_at(0), torch.float32 if setting.device == CPU else torch.float16
        shapes = [(LOCAL, one.size, one.size, 3) for one in loader.views]
        views = [torch.rand(each, dtype=dtype, device=setting.device).permute(0, 3, 1, 2) for each in shapes]
        with Watch(setting.device) as watch:
            batch = Batch.of(drawn, views, self.index.labels[drawn.index], setting.device)
        assert watch.copies == (setting.device == CUDA), f"a batch takes {watch.copies} copies"
        guide = build_guide(config.guide, Training(method, self.index, config.views, setting, self.folder))
        optimizer = optim.build_optimizer(method, config.optim, method.constant_lr)
        scaler = torch.amp.GradScaler(setting.device.type, enabled=setting.precision is torch.float16)
        return Trainee(config, setting, method, guide, optimizer, scaler, batch)


@pytest.fixture(scope="session")
def few_scenes(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], SampleIndex]:
    """Forty generated scenes, as a section of a configuration and as an index."""
    images, instances = make_scenes(tmp_path_factory.mktemp("few_scenes"), 40, size=48)
    data = {"kind": "coco", "path": str(images), "instances": str(instances), "val_share": 0}
    return data, SampleIndex.from_coco(images, instances, progress=False)


@pytest.fixture(name="case")
def make_case(few_scenes: tuple[dict[str, Any], SampleIndex], tmp_path: Path) -> Callable[..., Case]:
    """Makes a combination of a guide, a method and an encoder; each may be left out."""

    def make(guide: str = "contrastive_crop", method: str = "simclr", encoder: str = "test_resnet") -> Case:
        return Case(guide, method, encoder, *few_scenes, tmp_path)

    return make
