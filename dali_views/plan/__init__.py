"""Plan: which sample comes when, and which rectangle, flip and colour each view gets. NumPy only.

views    `View`: what the user asks for; recipes: the sets of views of published methods
order    which sample stands at which position of an epoch, and which rank takes it
epoch    position -> plan of a batch: order, replacement of unreadable images, choice of a region, draw
draw     crops and colour parameters of a batch; orientation: flips and rotations by right angles
rng      random numbers as a function of a key
"""
