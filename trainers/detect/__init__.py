"""Detection: Faster and Mask R-CNN from a run's encoder, with the loader of the pretraining.

truth   objects of COCO's JSON and VOC's XML     targets  moved with an image through resize and flip
model   torchvision's detectors on our encoders  scores   AP of COCO and of VOC
sides   images to train on and to test on        train    the loop
command  `python -m trainers detect`
"""
