"""Average precision of detections: COCO's by pycocotools, VOC 2007's by its eleven points."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from .truth import Truth, mask_tools

__all__ = ["Found", "coco_scores", "scores", "voc_scores"]

_THRESHOLDS = np.linspace(0.5, 0.95, 10)
_EDGES = np.arange(11) / 10  # of recall, where VOC 2007 reads the precision


class Found(NamedTuple):
    """The m detections in one image, in pixels of the image as stored."""

    boxes: NDArray[np.float64]  # (m, 4) x0, y0, x1, y1
    labels: NDArray[np.int64]  # (m,) from 1
    scores: NDArray[np.float64]  # (m,)
    masks: list[dict[str, Any]] | None = None  # m, compressed run lengths


def scores(truth: Truth, found: Mapping[int, Found]) -> dict[str, float]:
    """box_ap, box_ap50 and box_ap75, and of masks, if there are any, mask_ap, ...: shares in [0, 1].

    `found` has a row's detections; images without an entry, which could not be read, do not count.
    """
    if truth.voc:
        return voc_scores(truth, found)
    measured = coco_scores(truth, found, "bbox")
    if any(each.masks is not None for each in found.values()):
        measured |= coco_scores(truth, found, "segm")
    return measured


def coco_scores(truth: Truth, found: Mapping[int, Found], kind: str) -> dict[str, float]:
    """COCO's AP (mean over the IoU thresholds 0.5, 0.55, ..., 0.95), AP50 and AP75; 0 without a detection."""
    mask_tools()
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    name = {"bbox": "box", "segm": "mask"}[kind]
    marks: list[dict[str, Any]] = []
    results: list[dict[str, Any]] = []
    images: list[dict[str, int]] = []
    for row, each in sorted(found.items()):
        objects, (height, width) = truth.objects[row], truth.index.sizes[row].tolist()
        images.append({"id": row, "height": height, "width": width})
        for place, box in enumerate(_wide(objects.boxes)):
            mark: dict[str, Any] = {
                "id": len(marks) + 1,
                "image_id": row,
                "category_id": int(objects.labels[place]),
            }
            mark |= {"bbox": box, "area": float(objects.areas[place])}
            mark["iscrowd"] = int(objects.ignored[place])
            if kind == "segm":
                mask = objects.masks[place]
                if mask is None:
                    continue
                mark["segmentation"] = mask if isinstance(mask, dict) else [p.ravel().tolist() for p in mask]
            marks.append(mark)
        for place, box in enumerate(_wide(each.boxes)):
            result: dict[str, Any] = {"image_id": row, "category_id": int(each.labels[place]), "bbox": box}
            result["score"] = float(each.scores[place])
            if each.masks is not None:
                result["segmentation"] = each.masks[place]
            results.append(result)
    if not results:
        return {f"{name}_ap": 0.0, f"{name}_ap50": 0.0, f"{name}_ap75": 0.0}
    with contextlib.redirect_stdout(io.StringIO()):
        whole = COCO()
        whole.dataset = {
            "info": {}, "annotations": marks, "images": images,
            "categories": [{"id": label, "name": n} for label, n in enumerate(truth.classes, 1)],
        }  # fmt: skip
        whole.createIndex()
        judge = COCOeval(whole, whole.loadRes(results), kind)
        judge.evaluate()
        judge.accumulate()
        judge.summarize()
    # -1 says that there is no object to find.
    return {f"{name}_ap{end}": max(0.0, float(judge.stats[i])) for i, end in enumerate(("", "50", "75"))}


def voc_scores(truth: Truth, found: Mapping[int, Found]) -> dict[str, float]:
    """AP as VOC 2007 defines it, the mean over classes, at the IoUs that COCO takes.

    For each class, detections in falling order of score take the object of greatest IoU. It is right if the
    IoU is above the threshold and the object is free; nothing counts if the object is a difficult one.
    Precision is the greatest at a recall of 0, 0.1, ..., 1 or more. Classes without an object do not count.
    """
    per_class = []
    for label in range(1, len(truth.classes) + 1):
        best, scored, places, total = [], [], [], 0
        easy: list[bool] = []
        for row, each in sorted(found.items()):
            objects, mine = truth.objects[row], each.labels == label
            own = objects.labels == label
            boxes, first = objects.boxes[own], len(easy)
            easy += (~objects.ignored[own]).tolist()
            overlap = _overlaps(each.boxes[mine], boxes)
            best.append(overlap.max(1, initial=0.0))
            places.append(first + (overlap.argmax(1) if len(boxes) else np.zeros(len(overlap), np.int64)))
            scored.append(each.scores[mine])
        total = sum(easy)
        if total:
            order = np.argsort(-np.concatenate(scored), kind="stable")
            matched = np.concatenate(best)[order], np.concatenate(places)[order].tolist()
            per_class.append([_voc_ap(*matched, easy, total, limit) for limit in _THRESHOLDS])
    mean = np.mean(per_class, axis=0) if per_class else np.zeros(len(_THRESHOLDS))
    return {"box_ap": float(mean.mean()), "box_ap50": float(mean[0]), "box_ap75": float(mean[5])}


def _voc_ap(
    best: NDArray[np.float64], places: Sequence[int], easy: Sequence[bool], total: int, limit: float
) -> float:
    """AP of one class at one threshold, from IoU and object of each detection in falling order of score."""
    right, taken = [], set[int]()
    for overlap, place in zip(best.tolist(), places, strict=True):
        if overlap <= limit:
            right.append(False)
        elif easy[place]:
            right.append(place not in taken)
            taken.add(place)
    hits = np.cumsum(right)
    recall, precision = hits / total, hits / np.arange(1, len(right) + 1)
    return float(np.mean([precision[recall >= edge].max(initial=0.0) for edge in _EDGES]))


def _overlaps(one: NDArray[np.float64], other: NDArray[np.float64]) -> NDArray[np.float64]:
    """(m, n) IoU of boxes (m, 4) and (n, 4)."""
    low = np.maximum(one[:, None, :2], other[None, :, :2])
    both = np.clip(np.minimum(one[:, None, 2:], other[None, :, 2:]) - low, 0, None).prod(2)
    areas = [(boxes[:, 2:] - boxes[:, :2]).prod(1) for boxes in (one, other)]
    shared: NDArray[np.float64] = both / np.maximum(areas[0][:, None] + areas[1][None] - both, 1e-12)
    return shared


def _wide(boxes: NDArray[np.float64]) -> list[list[float]]:
    """COCO's boxes: x, y, width, height."""
    return np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], axis=1).tolist()  # type: ignore[no-any-return]
