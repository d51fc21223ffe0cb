"""Training: the paper's loop (`trainer`), what names a run (`config`), its pairs, devices, checkpoints and weights."""
