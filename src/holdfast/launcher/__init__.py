"""The launcher: ``holdfast run``, a drop-in for torchrun. Nothing here imports torch until a job is started."""
