"""Generation of large sets of images: a plan, workers that hold engines, shards, and resuming."""
