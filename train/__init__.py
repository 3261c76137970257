"""The recipe of the embedded model family: tasks, traces, model, training loop, evaluation."""
