"""Teachers that Limbeck trains itself: their recipes, the start that looks back, and the training."""
