"""What a run leaves for people. Here: names of the files in its folder, and of its most important numbers."""

CONFIG = "config.yaml"
METRICS = "metrics.jsonl"  # a line for every reading of the loss, evaluation and pass of the guide
EVALUATIONS = "evaluations.jsonl"  # a line for every evaluation by a command afterwards
PICTURES = "pictures"  # folder with the views of every evaluation during training
QUARANTINE = "quarantine.txt"  # images that could not be read; `SampleIndex.without` takes this file
INDEX = "index.safetensors"  # the images that the run began with
HISTORY = "history"  # folder of what the page needs beside the metrics, see `history`
PAGE = "report.html"

SCORES = {  # name and format
    "loss": ("loss", ".3f"), "knn_top1": ("kNN top-1", ".1%"), "knn_top5": ("kNN top-5", ".1%"),
    "online_test_top1": ("online", ".1%"), "box_ap": ("box AP", ".1%"), "box_ap50": ("box AP50", ".1%"),
    "mask_ap": ("mask AP", ".1%"), "iou": ("IoU", ".1%"), "corloc": ("CorLoc", ".1%"),
    "images_per_second": ("images/s", ",.0f"), "wait_share": ("host waits", ".1%"),
    "gpu_wait_share": ("GPU waits", ".1%"),
}  # fmt: skip
