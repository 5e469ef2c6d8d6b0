"""A small heatmap kept per image, from the views that training sees or from whole images."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dali_views.maps.align import Offset, align
from dali_views.maps.coordinates import map_to_image
from dali_views.maps.heatmap import activations, feature_grid
from dali_views.maps.tap import FeatureTap
from dali_views.system.stored import Form, check, entries, numbers

from ..engine import ranks

__all__ = ["KeptMaps", "ViewMaps"]

_ROWS = 1 << 16  # rows exchanged between ranks at a time; bounds the memory of `sync`


class ViewMaps:
    """Collects the activations of one layer while the encoder trains, call by call.

    All methods pass their views to the backbone in order, one by one or several as one batch, so that the
    rows of its output belong to view 0, view 1 and so on. Calls in eval mode are not collected. For the layer
    see `FeatureTap`, for tokens and channels `dali_views.maps.heatmap.feature_grid`.

    `offsets` holds, by the side of a view in pixels, how far its maps lie beside it. A mirrored or
    rotated view has its maps on the same side of the view, so they are aligned before they are put back into
    the image.
    """

    def __init__(
        self, backbone: nn.Module, layer: str, prefix_tokens: int = 0, channels_last: bool = False,
    ) -> None:  # fmt: skip
        self.prefix, self.channels_last = prefix_tokens, channels_last
        self.offsets: dict[int, Offset | None] = {}
        self.seen: list[tuple[int, Tensor]] = []
        self._tap = FeatureTap(backbone, layer)
        backbone.register_forward_hook(self._keep)  # after each call, when the tap has the layer's output

    def _keep(self, backbone: nn.Module, inputs: Any, output: Any) -> None:
        if backbone.training:
            features = feature_grid(self._tap.features, self.prefix, channels_last=self.channels_last)
            self.seen.append((inputs[0].shape[-1], activations(features)))

    def take(self, samples: int) -> list[Tensor]:
        """One (samples, h, w) map per view seen since the last call, in the order of the views.

        Standardised by mean and deviation over the views of one size: then steps can be averaged although
        features grow, and a crop of background does not get the contrast of an object.
        """
        views = []
        for side, maps in self.seen:
            deviation, mean = torch.std_mean(maps)
            placed = align((maps - mean) / deviation.clamp(min=1e-6), self.offsets.get(side))
            views += list(placed.view(-1, samples, *maps.shape[1:]))
        self.seen = []
        return views


class KeptMaps:
    """Maps (N, size, size), half precision, on the device: per cell an average over views or passes.

    A cell that no view has shown yet is NaN. 1.28 million maps of 16 x 16 take 656 MB. The exponential
    average, its rate (weight of a new map) and the standardisation are our choice; no paper has maps
    without a pass.
    """

    def __init__(self, length: int, size: int, rate: float, device: torch.device) -> None:
        self.rate = rate
        self.maps = torch.full((length, size, size), torch.nan, dtype=torch.float16, device=device)
        self.fresh = torch.zeros(length, dtype=torch.bool, device=device)

    @torch.no_grad()
    def add(
        self, index: Tensor, views: Tensor, crops: Tensor, flipped: Tensor, rotated: Tensor | None = None
    ) -> None:
        """Average one view's maps (B, h, w) into those of its images. Does not wait for the device.

        Args:
            index: (B,) rows, each at most once.
            crops, flipped, rotated: (B, 4), (B,) and (B,), where the view was cut.
        """
        height, width = self.maps.shape[1:]
        placed, covered = map_to_image(views.clamp(-100, 100), crops, flipped, (height, width), rotated)
        old = self.maps[index].float()
        mixed = torch.where(old.isnan(), placed, old.lerp(placed, self.rate))
        self.maps[index] = torch.where(covered, mixed, old).half()
        self.fresh[index] = True

    @torch.no_grad()
    def put(self, index: Tensor, maps: Tensor) -> None:
        """Average maps (B, h, w) of whole images into those of rows (B,); with rate 1 they replace them."""
        height, width = self.maps.shape[1:]
        mode = "area" if maps.shape[1] > height else "bilinear"
        small = F.interpolate(maps[:, None].float(), size=(height, width), mode=mode)[:, 0]
        old = self.maps[index].float()
        self.maps[index] = torch.where(old.isnan(), small, old.lerp(small, self.rate)).half()
        self.fresh[index] = True

    def normalised(self, rows: Tensor | slice) -> Tensor:
        """Maps (B, size, size), float32, scaled to [0, 1] by the minimum and maximum of each map.

        Cells never seen get the minimum; a map without contrast is all ones, as in `activation_map`.
        """
        maps = self.maps[rows].float()
        seen = ~maps.isnan()
        low = torch.where(seen, maps, torch.inf).amin((1, 2), keepdim=True)
        span = torch.where(seen, maps, -torch.inf).amax((1, 2), keepdim=True) - low
        usable = (span > 0) & span.isfinite()
        scaled = torch.where(seen, maps - low, 0.0) / torch.where(usable, span, 1.0)
        return torch.where(usable, scaled, 1.0)

    def sync(self) -> None:
        """Give all ranks the maps of the rows that any rank has changed since the last call."""
        rows = self.fresh.nonzero().flatten()
        if ranks.world() > 1:
            most = int(ranks.gather(torch.tensor([len(rows)], device=rows.device)).max())
            for start in range(0, most, _ROWS):
                mine = rows[start : start + _ROWS]
                everyone = ranks.gather_rows(mine)
                self.maps[everyone] = ranks.gather_rows(self.maps[mine])
        self.fresh.zero_()

    def state_dict(self) -> dict[str, Any]:
        """The maps, and the rows that other ranks do not know yet."""
        return {"maps": self.maps, "fresh": self.fresh}

    def form(self) -> Form:
        """What `load_state_dict` takes; cells that no view has shown are NaN."""
        maps, fresh = tuple(self.maps.shape), tuple(self.fresh.shape)
        return entries({"maps": numbers(maps, "float16"), "fresh": numbers(fresh, "bool")})

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a `state_dict()`; a ValueError if it has another number or size of maps."""
        remedy = "resume with the data and the guide that the run was begun with"
        check(state, self.form(), "the state of the kept maps", remedy)
        self.maps.copy_(state["maps"])
        self.fresh.copy_(state["fresh"])
