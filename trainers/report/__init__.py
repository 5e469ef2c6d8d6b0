"""What a run leaves for people. Here: the names of the files in its folder, beside its checkpoints."""

CONFIG = "config.yaml"
METRICS = "metrics.jsonl"  # a line for every reading of the loss, evaluation and pass of the guide
EVALUATIONS = "evaluations.jsonl"  # a line for every evaluation by a command afterwards
PICTURES = "pictures"  # folder with the views of every evaluation during training
QUARANTINE = "quarantine.txt"  # images that could not be read; `SampleIndex.without` takes this file
INDEX = "index.safetensors"  # the images that the run began with
HISTORY = "history"  # folder of what the page needs beside the metrics, see `history`
PAGE = "report.html"
