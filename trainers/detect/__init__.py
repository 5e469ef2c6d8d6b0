"""Detection: Faster and Mask R-CNN from a run's encoder, with the loader of the pretraining.

truth   objects of COCO's JSON and VOC's XML     targets  moved with an image through resize and flip
model   torchvision's detectors on our encoders  scores   AP of COCO and of VOC
train   the loop                                 command  `python -m trainers detect`
"""
