"""Budget guidance, offline: the predictor of the remaining thinking length, its training, its file."""
