"""Budget guidance, offline: the predictor of the remaining thinking length, its training, its file."""

# Here, so that whoever only looks whether there is a predictor need not wait for torch.
ABOUT = "predictor.json"
