"""Engine: what every run needs, whatever it trains; the loop itself is `pretrain.py`.

setting     device, precision, seed, threads      ranks       processes and gathers
optim       optimisers and schedules              checkpoint  written whole, with a spare
interrupt   signals, and restarts by torchrun
"""
