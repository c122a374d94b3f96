"""Teachers that Limbeck trains itself: the start that looks back, and the training."""
